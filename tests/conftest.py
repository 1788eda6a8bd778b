"""Offline, on one thread, with fixed examples: a test fails the same way on every machine."""

import atexit
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

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


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Share the tests out between processes by file; one process has all files with Ray tests.

    Two clusters at once would compete for the cores that their time limits count on.
    """
    return _OneProcessForRay(config, log)


class _OneProcessForRay(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ray" if _starts_ray(self.config.rootpath / file) else file


@cache
def _starts_ray(file: Path) -> bool:
    """Return whether a file has tests that start Ray and are not nightly.

    Read from its text: the process that shares the tests out collects none.
    """
    return bool(re.search(r"mark\.ray\b(?!\n@pytest\.mark\.nightly)", file.read_text()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with Ray's tests where they run beside the others: they take longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not _starts_ray(item.path))


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
