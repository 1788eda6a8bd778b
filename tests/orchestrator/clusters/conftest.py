"""One cluster with its token for all tests of jobs."""

from collections.abc import Iterator

import pytest

from tests.live import LiveCluster
from tests.live import live_cluster as started

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="session")
def live_cluster(tmp_path_factory) -> Iterator[LiveCluster]:
    with started(tmp_path_factory.mktemp("home"), token=TOKEN) as cluster:
        yield cluster
