"""A group of two processes that Ray Train joins: the bits are those of one process without Ray."""

import tempfile
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from actors.messages import WorkerSetup
from actors.storage.files import Directory
from actors.training.group import Alone
from actors.training.loop import train
from orchestrator.backend import ray_cluster, ray_training
from orchestrator.backend.executor import FailureClass, WorkerFailed, WorkerLost
from orchestrator.backend.local import LocalExecutor
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.backend.ray_failures import GroupFailure
from orchestrator.backend.train_policies import LIMITS, Restarts
from orchestrator.engine.worker_pool import Pool
from orchestrator.rundir.journal import Journal
from planners.errors import ClusterError, ConfigError, NumericsError, StorageError
from tests.trainings import CORE, UNIT, request, tiny_models, trained_bytes


@pytest.fixture(scope="module")
def local_ray():
    with ray_cluster.connected("local", num_cpus=2, num_gpus=0, store_bytes=0):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


def results_of_ray():
    homes = (
        Path.home() / "ray_results",
        *Path(tempfile.gettempdir()).glob("compress-cluster-train-*"),
    )
    return {path for path in homes if path.exists()}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_workers_have_the_bytes_of_one_and_leave_nothing_behind(models, tmp_path):
    asked = request(models, tmp_path / "two", steps=8)
    before = results_of_ray()
    training = RayExecutor().train(asked, num_workers=(1, 2), resources=CORE, name=UNIT)
    assert not training.done()
    training.result()
    train(request(models, tmp_path / "one", steps=8), Alone())
    assert trained_bytes(tmp_path / "two") == trained_bytes(tmp_path / "one")
    assert results_of_ray() == before
    assert nothing_runs()


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.usefixtures("local_ray")
def test_what_the_training_refuses_is_raised_once(models, tmp_path):
    asked = request(models, tmp_path, steps=3, rate=1e30, relative=False)
    training = RayExecutor().train(asked, num_workers=(1, 2), resources=CORE, name=UNIT)
    with pytest.raises(NumericsError, match="recovery: the loss is") as caught:
        training.result()
    assert caught.value.hint.startswith("use a smaller rate")
    assert "train_worker" in caught.value.__notes__[0]
    assert nothing_runs()


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.usefixtures("local_ray")
def test_a_cancelled_group_is_gone(models, tmp_path):
    asked = request(models, tmp_path, steps=10_000)
    training = RayExecutor().train(asked, num_workers=(1, 1), resources=CORE, name=UNIT)
    while not list(tmp_path.glob("training/*.json")):
        assert not training.done()
        time.sleep(0.1)
    training.cancel()
    assert nothing_runs()


def nothing_runs():
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        alive = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
        if not alive and ray.available_resources().get("CPU") == 2:
            return True
        time.sleep(0.1)
    return False


def test_a_training_in_this_process_has_ended_when_it_is_returned(models, tmp_path):
    asked = request(models, tmp_path, steps=1)
    training = LocalExecutor().train(asked, num_workers=(1, 1), resources=CORE, name=UNIT)
    assert training.done()
    training.result()
    assert trained_bytes(tmp_path)


def test_the_error_of_a_training_in_this_process_is_raised_by_its_result(models, tmp_path):
    asked = request(models, tmp_path, steps=3, rate=1e30, relative=False)
    training = LocalExecutor().train(asked, num_workers=(1, 1), resources=CORE, name=UNIT)
    with pytest.raises(NumericsError, match="recovery: the loss is"):
        training.result()


def test_a_missing_package_is_refused_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(ray_training.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs pandas") as caught:
        ray_training.require_train()
    assert "pip install 'compress-cluster[train]'" in caught.value.hint


LEFT = GroupFailure(FailureClass.PREEMPTED, "its node goes")
PEER = GroupFailure(FailureClass.WORKER_CRASHED, "another worker is lost: gloo")
DEFECT = GroupFailure(FailureClass.DEFECT, "Traceback\nTypeError: no")
DEAD = WorkerHealthCheckFailedError("failed", ActorDiedError())


@pytest.mark.parametrize(
    ("failures", "retries"),
    [
        ([LEFT], 1000),
        ([DEAD], LIMITS[FailureClass.WORKER_CRASHED]),
        ([PEER, DEAD], LIMITS[FailureClass.WORKER_CRASHED]),
        ([DEFECT, DEAD], LIMITS[FailureClass.WORKER_CRASHED]),
        ([DEFECT], 1),
        ([StorageError("a store fails")], 1),
        ([NumericsError("no number")], 0),
        ([PEER, NumericsError("no number")], 0),
        ([ClusterError("no room")], 0),
    ],
)
def test_a_group_is_started_again_as_often_as_that_may_help(failures, retries):
    error = WorkerGroupError("", dict(enumerate(failures)))
    if isinstance(failures[0], ClusterError):
        error = ControllerError(failures[0])
    policy = Restarts(FailureConfig())
    decisions = [policy.make_decision(error) for _ in range(retries + 1)]
    assert decisions[:retries] == [FailureDecision.RETRY] * retries
    assert retries == 1000 or decisions[-1] is FailureDecision.RAISE


@pytest.mark.parametrize(
    ("failures", "kind"),
    [
        ([DEAD, NumericsError("no number")], NumericsError),
        ([DEAD, DEFECT], WorkerFailed),
        ([PEER, DEAD], WorkerLost),
    ],
)
def test_the_worker_that_tells_most_is_heard(failures, kind):
    error = WorkerGroupError("", dict(enumerate(failures)))
    assert type(ray_training.explained(error)) is kind


def test_a_pool_that_was_vacated_has_as_many_new_workers(tmp_path):
    setup = WorkerSetup(name="pattern", incarnation="", threads=1, device="cpu")
    journal = Journal(Directory(str(tmp_path)), [].append)
    pool = Pool(LocalExecutor(), setup, num_workers=2, journal=journal)
    before = {pool.incarnation(slot) for slot in range(2)}
    with pool.vacated():
        assert pool.num_workers == 0
    assert before.isdisjoint({pool.incarnation(slot) for slot in range(2)})
