"""Nodes that die, freeze, are drained, or are not there: the bits stay, and people are told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.backend import preemption
from orchestrator.backend.executor import InputLost, Resources
from orchestrator.backend.ray_executor import RayExecutor
from planners.errors import ClusterError
from tests.builders import compress_local, result_files, save_model
from tests.nodes import Disturbance, Nodes, WatchedExecutor, node_of
from tests.orchestrator.test_notices import PREEMPTED, metadata

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("nodes")]
COMMAND = Path(sys.executable).with_name("compress-cluster")
SAVING = {"save_microbatches": 1}


@pytest.fixture(scope="module")
def nodes():
    with Nodes(3) as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return result_files(out)


@pytest.fixture
def held_core():
    held = HeldCore()
    yield held
    held.give_back()


class HeldCore:
    """One core of the cluster that is taken by somebody else."""

    def __init__(self):
        self._executor = RayExecutor()
        self._holder = self._executor.spawn(
            Idle, resources=Resources(num_cpus=1), name=f"holds-a-core-{time.time()}"
        )
        self._executor.result(self._executor.locate(self._holder))

    def give_back(self):
        self._executor.kill(self._holder)


def test_a_killed_node_is_noticed_within_seconds_and_costs_no_bit(
    nodes, model, undisturbed, tmp_path
):
    executor = WatchedExecutor()
    disturbance = Disturbance(
        "calibrate", 5, lambda: nodes.kill(node_of(nodes, executor, "worker-1"))
    )
    compress_local(
        model, tmp_path, executor=executor, listener=disturbance, workers=2, calibration=SAVING
    )
    nodes.refill()
    assert disturbance.seconds_until("node lost") < 15
    assert disturbance.recorded_once()
    assert result_files(tmp_path) == undisturbed


def test_a_frozen_node_is_noticed_within_15_seconds(nodes, model, undisturbed, tmp_path):
    executor = WatchedExecutor()
    disturbance = Disturbance(
        "calibrate", 5, lambda: nodes.freeze(node_of(nodes, executor, "worker-1"))
    )
    compress_local(
        model, tmp_path, executor=executor, listener=disturbance, workers=2, calibration=SAVING
    )
    nodes.refill()
    assert disturbance.seconds_until("node lost") < 15
    assert disturbance.recorded_once()
    assert result_files(tmp_path) == undisturbed


@pytest.mark.parametrize("phase", ["calibrate", pytest.param("basis", marks=pytest.mark.nightly)])
def test_a_drained_node_is_left_before_it_goes(
    nodes, model, undisturbed, tmp_path, monkeypatch, phase
):
    monkeypatch.setattr(
        "orchestrator.engine.worker_pool.DRAIN_SECONDS", 0.0
    )  # the whole run takes seconds
    executor = WatchedExecutor()
    leaving = []

    def drain():
        leaving.append(node_of(nodes, executor, "worker-0"))
        preemption.drain(leaving[0].node_id, seconds=30, message="a test")

    disturbance = Disturbance(phase, 3, drain)
    compress_local(
        model, tmp_path, executor=executor, listener=disturbance, workers=2, calibration=SAVING
    )
    nodes.kill(leaving[0])
    nodes.refill()
    kinds = disturbance.kinds()
    assert "notice" in kinds
    assert "preempted" in kinds
    assert "node lost" not in kinds
    assert executor.places["worker-0"].node != leaving[0].node_id
    assert disturbance.recorded_once()
    assert result_files(tmp_path) == undisturbed


def test_a_cloud_that_takes_a_machine_drains_its_node(nodes):
    with metadata("gcp", {PREEMPTED: "FALSE"}) as (base, said), preemption.Watchers(metadata=base):
        time.sleep(1)
        assert preemption.draining() == {}
        said[PREEMPTED] = ["TRUE"]  # to the first that asks, and to no other
        wait_until(preemption.draining)
        ((node, left),) = preemption.draining().items()
        assert 20 < left <= 30
    (taken,) = [n for n in nodes.nodes if n.node_id == node]
    nodes.kill(taken)
    nodes.refill()


def test_the_watch_of_a_cluster_file_drains_its_node_on_sigterm(nodes):
    node = nodes.nodes[0]
    arguments = ["--address", nodes.address, "--node", node.node_id]
    with metadata("gcp", {PREEMPTED: "FALSE"}) as (base, _):
        watching = subprocess.Popen(
            [COMMAND, "watch-node", *arguments, "--metadata", base],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert "watching node" in watching.stdout.readline()
        watching.terminate()
        said, _ = watching.communicate(timeout=30)
    assert f"SIGTERM: node {node.node_id} is preempted in 30 s" in said
    assert watching.returncode == 0
    nodes.kill(node)
    nodes.refill()


@pytest.mark.usefixtures("held_core")
def test_a_worker_without_a_machine_is_waited_for_in_words_and_not_for_ever(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr("orchestrator.engine.worker_pool.ANNOUNCE_SECONDS", 1.0)
    events = []
    with pytest.raises(
        ClusterError, match=r"no machine had room for worker-\d within 6 s"
    ) as caught:
        compress_local(
            model, tmp_path, executor=RayExecutor(), listener=events.append, workers=3,
            place_seconds=6,
        )  # fmt: skip
    assert "needs 1 CPU" in str(caught.value)
    assert "0 of 3 CPU" in str(caught.value)
    assert "finished work is kept" in caught.value.hint
    assert "waiting" in [e["kind"] for e in events]


def test_capacity_that_comes_back_is_used(held_core, model, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.engine.worker_pool.ANNOUNCE_SECONDS", 1.0)
    disturbance = Disturbance("waiting", 1, held_core.give_back)
    compress_local(model, tmp_path, executor=RayExecutor(), listener=disturbance, workers=3)
    assert "placed" in disturbance.kinds()
    assert result_files(tmp_path) == undisturbed


@pytest.mark.usefixtures("held_core")
def test_units_go_on_with_the_workers_that_are_there(model, undisturbed, tmp_path):
    compress_local(model, tmp_path, workers=3)
    for record in (tmp_path / "records").glob("layer-*"):
        record.unlink()
    events = []
    # Its third worker never comes; no pass is left that would need it.
    compress_local(model, tmp_path, executor=RayExecutor(), listener=events.append, workers=3)
    assert len({e["worker"] for e in events if e["kind"] == "layer"}) <= 2
    assert result_files(tmp_path) == undisturbed


@pytest.mark.parametrize("phase", ["calibrate", pytest.param("basis", marks=pytest.mark.nightly)])
def test_a_worker_that_stands_still_is_shown_and_given_up(
    model, undisturbed, tmp_path, monkeypatch, phase
):
    monkeypatch.setattr("orchestrator.engine.deadlines.FLOOR_SECONDS", 8.0)
    monkeypatch.setattr("orchestrator.engine.deadlines.TIMES", 0.0)
    executor = WatchedExecutor()
    disturbance = Disturbance(
        phase, 7, lambda: os.kill(executor.places["worker-1"].pid, signal.SIGSTOP)
    )
    compress_local(model, tmp_path, executor=executor, listener=disturbance, workers=2)
    silent = [e for e in disturbance.events if e["kind"] == "silent"]
    assert [e["worker"] for e in silent] == ["worker-1"]
    assert "does not react to signals" in silent[0]["detail"]
    assert result_files(tmp_path) == undisturbed


def test_the_stack_of_a_worker_is_shown_while_it_is_busy():
    executor = RayExecutor()
    handle = executor.spawn(Idle, resources=Resources(num_cpus=1), name="busy")
    ticket = executor.locate(handle)
    where = executor.result(ticket)
    executor.call(handle, "wait_for_nothing", label="busy")
    time.sleep(0.5)
    assert "wait_for_nothing" in executor.stack(where)
    executor.kill_process(where)  # by force: it removes nothing itself
    wait_until(lambda: not psutil.pid_exists(where.pid))
    executor.kill(handle)
    after = executor.spawn(Idle, resources=Resources(num_cpus=1), name="after")
    later = executor.result(executor.locate(after))
    assert not Path(where.stack_file).exists()
    assert Path(later.stack_file).exists()
    executor.kill(after)


def test_an_input_whose_maker_died_is_lost_and_no_fault_of_who_reads_it():
    executor = RayExecutor()
    maker, reader = (
        executor.spawn(Idle, resources=Resources(num_cpus=1), name=name) for name in ("m", "r")
    )
    for actor in (maker, reader):
        executor.result(executor.locate(actor))
    slow = executor.call(maker, "make", 60.0, label="make")
    asked = executor.call(reader, "read", slow, label="read")
    executor.kill(maker)
    wait_until(lambda: executor.ready([asked], seconds=0.1))
    with pytest.raises(InputLost):
        executor.result(asked)
    assert executor.result(executor.call(reader, "make", 0.0, label="make")) == b"made"
    executor.kill(reader)


class Idle:
    """An actor that holds a core."""

    def wait_for_nothing(self):
        time.sleep(60)

    def make(self, seconds):
        time.sleep(seconds)
        return b"made"

    def read(self, made):
        return len(made)


def wait_until(holds, *, seconds=30):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
