"""Real processes that really die: the run goes on by itself and the bits are the same."""

import os
import signal

import pytest
import ray

from actors.storage.files import Directory
from orchestrator.executors import RayExecutor
from orchestrator.journal import read_events
from tests.builders import compress_local, result_files, save_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


class WatchedExecutor(RayExecutor):
    """Remembers which process is which worker."""

    def __init__(self):
        super().__init__()
        self.workers = {}

    def spawn(self, actor_class, *args, resources, name):
        handle = super().spawn(actor_class, *args, resources=resources, name=name)
        self.workers[name.rpartition("-")[0]] = handle
        return handle

    def kill_process(self, worker):
        pid = ray.get(self.workers[worker].__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        return pid


class Murderer:
    """Kills a worker's process when an event of some kind has been seen so many times."""

    def __init__(self, executor, worker, kind, count):
        self._executor, self._worker = executor, worker
        self._kind, self._left = kind, count
        self.pids = []

    def __call__(self, event):
        if event["kind"] == self._kind:
            self._left -= 1
            if self._left == 0:
                self.pids.append(self._executor.kill_process(self._worker))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return result_files(out)


@pytest.mark.parametrize(
    ("worker", "kind", "count"),
    [
        ("worker-0", "calibrate", 7),
        ("worker-1", "calibrate", 7),
        ("worker-0", "statistics", 1),
        ("worker-0", "basis", 2),
        ("worker-1", "layer", 1),
        ("worker-1", "evaluate", 2),
    ],
)
def test_a_killed_worker_changes_no_bit(model, undisturbed, tmp_path, worker, kind, count):
    executor = WatchedExecutor()
    murderer = Murderer(executor, worker, kind, count)
    compress_local(model, tmp_path, executor=executor, listener=murderer, workers=2)
    assert murderer.pids
    assert result_files(tmp_path) == undisturbed
    lost = [e for e in read_events(Directory(str(tmp_path))) if e["kind"] == "worker lost"]
    assert [event["worker"] for event in lost] == [worker]
