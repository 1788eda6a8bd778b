"""Real processes, some of which really die: the bits are those of a run in one process."""

import contextlib
import os
import signal
import time
from collections import Counter

import psutil
import pytest
import ray

from actors.messages import ThroughputRequest, WorkerSetup
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.worker.stage import Stage
from orchestrator.backend import ray_cluster
from orchestrator.backend.executor import Resources, WorkerLost
from orchestrator.backend.ray_executor import RayExecutor, spawn_early
from orchestrator.cli.ahead import STAGE
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.throughput import Workers, through_stages
from orchestrator.rundir.journal import Journal, read_events
from planners.errors import ClusterError
from planners.memory.generation import generation_load
from tests.builders import compress_local, result_files, run_local, save_model
from tests.orchestrator.test_quantised_runs import GPTQ, HULL

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


class Murderer:
    """Kills a worker's process when so many events of some kind have been seen."""

    def __init__(self, executor, *plans):
        self._executor = executor
        self._plans = {(kind, count): worker for worker, kind, count in plans}
        self._seen = Counter()
        self.killed = []

    def __call__(self, event):
        self._seen[event["kind"]] += 1
        worker = self._plans.pop((event["kind"], self._seen[event["kind"]]), None)
        if worker is not None:
            self._executor.kill_process(worker)
            self.killed.append(worker)


@pytest.fixture(scope="module")
def local_ray():
    with ray_cluster.connected("local", num_cpus=4, num_gpus=0, store_bytes=0):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return result_files(out)


@pytest.mark.slow
def test_workers_killed_in_calibration_and_compression_change_no_bit(model, undisturbed, tmp_path):
    executor = WatchedExecutor()
    murderer = Murderer(
        executor,
        # In the middle of its microbatches, with the stage behind it waiting for more.
        ("worker-0", "calibrate", 7),
        # In the middle of its units; the other worker goes on.
        ("worker-1", "basis", 3),
    )
    compress_local(model, tmp_path, executor=executor, listener=murderer, workers=2)
    assert murderer.killed == ["worker-0", "worker-1"]
    assert result_files(tmp_path) == undisturbed
    lost = [e for e in read_events(Directory(str(tmp_path))) if e["kind"] == "worker crashed"]
    assert [event["worker"] for event in lost] == murderer.killed


@pytest.mark.nightly  # by errors in this process: test_quantised_runs.py
@pytest.mark.parametrize(
    ("recipe", "kind"), [(GPTQ, "layer"), (HULL, "damage"), (HULL, "refit_layer")]
)
def test_a_worker_killed_as_it_rounds_measures_or_corrects_changes_no_byte(tmp_path, recipe, kind):
    model = save_model(tmp_path / "model", intermediate_size=64)
    compress_local(model, tmp_path / "undisturbed", **recipe)
    executor = WatchedExecutor()
    # Of the corrected pass, which one worker does: the first one it takes.
    worker = "worker-0" if kind == "refit_layer" else "worker-1"
    murderer = Murderer(executor, (worker, kind, 2))
    compress_local(
        model, tmp_path / "run", executor=executor, listener=murderer, workers=2, **recipe
    )
    assert murderer.killed == [worker]
    assert result_files(tmp_path / "run") == result_files(tmp_path / "undisturbed")


@pytest.mark.nightly  # two below, and one to nine in one process: test_invariance.py
def test_four_workers_write_the_bytes_that_this_process_writes(model, undisturbed, tmp_path):
    compress_local(model, tmp_path, executor=RayExecutor(), workers=4)
    assert result_files(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_whole_run_on_two_workers_is_ready_and_writes_the_same_bytes(
    model, undisturbed, tmp_path
):
    report = run_local(model, tmp_path, executor=RayExecutor(), workers=2)
    assert report["verdict"] == "READY"
    assert report["verify"]["passed"]
    assert (tmp_path / "READY").exists()
    assert result_files(tmp_path) == undisturbed


def test_a_process_that_was_started_early_becomes_the_first_worker(model, undisturbed, tmp_path):
    early = [spawn_early(STAGE, resources=Resources.of_worker(1, "cpu"), shown="worker-0")]
    process = early[0].handle
    compress_local(model, tmp_path, executor=RayExecutor(early=early))
    assert early == []
    assert result_files(tmp_path) == undisturbed
    with pytest.raises(ray.exceptions.RayActorError):  # it was used, and ended with its pool
        ray.get(process.call.remote("__repr__"))


def test_a_process_that_was_started_early_and_cannot_become_its_worker_ends():
    early = [spawn_early(STAGE, resources=Resources.of_worker(1, "cpu"), shown="worker-0")]
    executor = RayExecutor(early=early)
    setup = WorkerSetup(name="worker-0", incarnation="one", threads=-1, device="cpu")
    handle = executor.spawn(Stage, setup, resources=Resources.of_worker(1, "cpu"), name="one")
    ticket = executor.call(handle, "drop", label="drop")
    with pytest.raises(WorkerLost):
        executor.result(ticket)


def test_a_model_generates_over_two_processes(model, tmp_path):
    request = ThroughputRequest(
        uris={"dense": str(model)}, prompt=6, batches=[2], new_tokens=8, max_rounds=1
    )
    found = Checkpoint(str(model))
    load = generation_load(found.shape, found.form, batch=2, tokens=14)
    workers = Workers(number=2, bytes=sum(load.stage(2, tables=1).values()))
    setup = WorkerSetup(name="pattern", incarnation="", threads=1, device="cpu")
    journal = Journal(Directory(str(tmp_path)), [].append)
    done = through_stages(
        request,
        workers,
        lambda number: Pool(RayExecutor(), setup, num_workers=number, journal=journal),
    )
    (row,) = done.values["dense"]["settings"]
    assert row["stages"] == 2
    assert row["decode_tokens_per_second"] > 0
    assert row["peak_bytes"] >= found.total_bytes


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1"])
def test_where_nothing_listens_there_is_no_cluster_and_that_is_said_at_once(address):
    begun = time.monotonic()
    joining = ray_cluster.connected(address, num_cpus=1, num_gpus=0, store_bytes=0)
    with pytest.raises(ClusterError, match="nothing listens"), joining:
        pass
    assert time.monotonic() - begun < 10


def test_nothing_of_a_local_cluster_listens_beyond_this_machine():
    """Metrics have no token, so they must not be reached; nor must anything else be."""
    session = ray._private.worker._global_node.get_session_dir_path()
    ours = set()
    for process in psutil.process_iter(["cmdline"]):
        if session in " ".join(process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                ours |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    listening = {
        each.laddr.ip
        for each in psutil.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.pid in ours
    }
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
