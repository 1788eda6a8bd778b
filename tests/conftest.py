"""Offline, on one thread, with fixed examples: a test fails the same way on every machine."""

import atexit
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from orchestrator import cluster

_remote_code = tempfile.TemporaryDirectory(prefix="compress-cluster-tests-")
atexit.register(_remote_code.cleanup)

# Before anything imports ray or transformers, and inherited by every process a test starts.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": _remote_code.name,
        "RAY_AUTH_MODE": "disabled",  # else ray writes a token into the home directory
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)

torch.set_num_threads(1)

settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile("ci")  # another: pytest --hypothesis-profile nightly


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of larger models and reference numbers that lies beside a checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "models").is_dir():
        pytest.skip("needs ../shared/models, which a fresh clone has not")
    return path


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start one small Ray cluster for all tests that need one."""
    with cluster.connected("local", num_cpus=4, num_gpus=0, store_bytes=0):
        yield
