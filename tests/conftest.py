"""Offline, on one thread, with fixed examples: a test fails the same way on every machine."""

import atexit
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.stores import KEYS, FaultyStore, new_bucket, s3_server, uri_of

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


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Share the tests out between processes: a file stays whole, one process has all Ray tests.

    Two clusters at once would compete for the cores that their time limits count on. Ray's tests
    take longest, so they begin first.
    """
    if not hasattr(config, "workerinput"):
        return
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of larger models and reference numbers that lies beside a checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "models").is_dir():
        pytest.skip("needs ../shared/models, which a fresh clone has not")
    return path


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Start one S3 server on loopback for all tests that need one; give its port."""
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function from a path to its URI in a new bucket."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    bucket = new_bucket(s3_port)
    return lambda path: uri_of(s3_port, f"{bucket}/{path}")


@pytest.fixture
def faulty(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """Give a proxy before the S3 server, with a new bucket; it fails where it is told to."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    store = FaultyStore(s3_port)
    store.bucket = new_bucket(s3_port)
    yield store
    store.close()
