"""Every class of failures in every place where calls are made: one decision each, and its limit."""

import pytest

from actors.messages import ThroughputRequest, WorkerSetup
from actors.storage.files import Directory
from orchestrator.backend.executor import FailureClass, InputLost, WorkerFailed, WorkerLost
from orchestrator.engine.failure_policy import POLICIES, Action, Place, class_of, decide
from orchestrator.engine.fresh_process import EvaluatorProcess, FreshProcess, in_fresh_process
from orchestrator.engine.supervisor import Call, Supervisor
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.throughput import Workers, through_stages
from orchestrator.rundir.journal import Journal
from planners.errors import ClusterError, CompressionError, ModelError, NumericsError, StorageError
from tests.builders import compress_local, result_files, save_model
from tests.orchestrator.test_failures import FailingExecutor

RETRY, REPLACE, STOP = Action.RETRY, Action.REPLACE, Action.STOP
NEVER = 10**6
PLACES = (Place.STAGE, Place.ANY_WORKER, Place.NOWHERE_ELSE)
TABLE = {  # class -> what follows in each place, and which try of a piece of work is the last
    FailureClass.PREEMPTED: ((REPLACE, NEVER), (REPLACE, 8), (REPLACE, 8)),
    FailureClass.NODE_LOST: ((REPLACE, NEVER), (REPLACE, 4), (REPLACE, 4)),
    FailureClass.WORKER_CRASHED: ((REPLACE, 2), (REPLACE, 2), (REPLACE, 2)),
    FailureClass.STALLED: ((REPLACE, 2), (REPLACE, 2), (REPLACE, 2)),
    FailureClass.OUT_OF_MEMORY: ((REPLACE, 2), (REPLACE, 2), (REPLACE, 2)),
    FailureClass.LOST_INPUT: ((RETRY, NEVER), (RETRY, 50), (RETRY, 50)),
    FailureClass.STORAGE_ERROR: ((REPLACE, 2), (RETRY, 2), (RETRY, 2)),
    FailureClass.NUMERIC_FAILURE: ((REPLACE, 2), (RETRY, 2), (STOP, 1)),
    FailureClass.DEFECT: ((REPLACE, 2), (RETRY, 2), (STOP, 1)),
    FailureClass.USER_ERROR: ((STOP, 1), (STOP, 1), (STOP, 1)),
}
EXAMPLES = {  # class -> what a call of it raises
    **{
        reason: WorkerLost(reason, "gone")
        for reason in (
            FailureClass.PREEMPTED,
            FailureClass.NODE_LOST,
            FailureClass.WORKER_CRASHED,
            FailureClass.STALLED,
            FailureClass.OUT_OF_MEMORY,
        )
    },
    FailureClass.LOST_INPUT: InputLost("gone"),
    FailureClass.STORAGE_ERROR: StorageError("the store said 503"),
    FailureClass.NUMERIC_FAILURE: NumericsError("not positive definite"),
    FailureClass.DEFECT: WorkerFailed("Traceback ...\nZeroDivisionError: division by zero"),
    FailureClass.USER_ERROR: ModelError("a NaN"),
}
ALL_FAILURES = pytest.mark.parametrize("failure", list(FailureClass))
ALL_PLACES = pytest.mark.parametrize("number", range(len(PLACES)), ids=lambda n: PLACES[n].name)
SETUP = WorkerSetup(name="worker-0", incarnation="one", threads=1, device="cpu")


class Told(list):
    """The events that a supervisor tells, by kind."""

    def emit(self, kind, **fields):
        self.append((kind, fields))

    @property
    def kinds(self):
        return [kind for kind, _ in self]


@ALL_FAILURES
def test_an_error_has_the_class_that_the_table_names(failure):
    assert set(POLICIES) == set(FailureClass) == set(TABLE) == set(EXAMPLES)
    assert class_of(EXAMPLES[failure]) is failure


@ALL_PLACES
@ALL_FAILURES
def test_each_class_in_each_place_has_one_decision_until_its_last_try(failure, number):
    action, last = TABLE[failure][number]
    for times in range(1, POLICIES[failure].budget + 2):
        expected = action if times < last else STOP
        assert decide(failure, PLACES[number], times=times) is expected


@ALL_PLACES
@ALL_FAILURES
def test_a_run_goes_on_after_as_many_failures_as_the_decisions_say(failure, number):
    """It ends at the last try of a piece of work, or at the first failure beyond the budget."""
    action, last = TABLE[failure][number]
    told, error = Told(), EXAMPLES[failure]
    supervisor, call = Supervisor(told.emit), Call(name="layer-00001", place=PLACES[number])
    survived = min(last - 1, POLICIES[failure].budget)
    for _ in range(survived):
        assert supervisor.handle(call, error) is action
    with pytest.raises(CompressionError) as caught:
        supervisor.handle(call, error)
    assert told.kinds[:survived] == [failure] * survived
    assert told.kinds[survived:] == (["gave up"] if last == survived + 1 else [failure])
    if failure not in (FailureClass.NUMERIC_FAILURE, FailureClass.USER_ERROR):
        assert POLICIES[failure].hint in caught.value.hint


@pytest.mark.parametrize("failure", [f for f in FailureClass if f is not FailureClass.USER_ERROR])
def test_a_run_that_meets_a_class_in_other_work_each_time_ends_beyond_the_budget(failure):
    supervisor, error = Supervisor(Told().emit), EXAMPLES[failure]
    for number in range(POLICIES[failure].budget):
        supervisor.handle(Call(name=str(number), place=Place.ANY_WORKER), error)
    with pytest.raises(ClusterError, match="were lost in this run"):
        supervisor.handle(Call(name="one more", place=Place.ANY_WORKER), error)


def test_work_that_was_finished_has_all_its_tries_when_it_is_done_once_more():
    supervisor = Supervisor(Told().emit)
    call = Call(name="layer-00001", place=Place.ANY_WORKER)
    crash, store = (EXAMPLES[f] for f in (FailureClass.WORKER_CRASHED, FailureClass.STORAGE_ERROR))
    assert supervisor.handle(call, store) is RETRY
    assert supervisor.handle(call, crash) is REPLACE
    assert supervisor.finish(call.name) == ["worker crashed", "storage error"]
    assert supervisor.handle(call, crash) is REPLACE
    with pytest.raises(ClusterError, match="layer-00001 lost its worker 2 times"):
        supervisor.handle(call, crash)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def goes_on(failure, work):
    """Do work that meets a failure once; see that it goes on or stops, as the table says."""
    action, _ = TABLE[failure][PLACES.index(Place.NOWHERE_ELSE)]
    if action is STOP:
        with pytest.raises(CompressionError):
            work()
    else:
        work()


def request_of(model):
    return ThroughputRequest(
        uris={"it": str(model)}, prompt=3, batches=[1], new_tokens=2, max_rounds=1
    )


@ALL_FAILURES
def test_a_fresh_process_follows_the_table(failure, model):
    executor, told = FailingExecutor("timed", EXAMPLES[failure], times=1), Told()
    fresh = FreshProcess(unit="timed", threads=1, device="cpu")
    goes_on(failure, lambda: in_fresh_process(
        executor, fresh, "throughput", request_of(model), supervisor=Supervisor(told.emit)
    ))  # fmt: skip
    assert executor.left == 0
    stops = TABLE[failure][PLACES.index(Place.NOWHERE_ELSE)][0] is STOP
    assert told.kinds == ["gave up" if stops else failure]
    assert {fields["unit"] for _, fields in told} == {"timed"}


def test_one_process_takes_several_requests_and_another_follows_a_lost_one(model):
    executor = FailingExecutor("second", EXAMPLES[FailureClass.WORKER_CRASHED], times=1)
    spawned = []
    spawn = executor.spawn

    def counted(actor_class, *args, resources, name):
        spawned.append(resources)
        return spawn(actor_class, *args, resources=resources, name=name)

    executor.spawn = counted
    process = EvaluatorProcess(executor, threads=1, device="cpu", shares=True)
    assert not spawned
    process.start()
    process.start()
    supervisor = Supervisor(Told().emit)
    for unit, processes in (("first", 1), ("second", 2), ("third", 2)):
        process.answer(unit, "throughput", request_of(model), supervisor=supervisor)
        assert len(spawned) == processes
    process.close()
    assert {each.num_cpus for each in spawned} == {0.0}  # workers are never short of a core


@ALL_FAILURES
def test_generation_through_stages_follows_the_table(failure, model, tmp_path):
    executor = FailingExecutor("generate 3", EXAMPLES[failure], times=1)
    journal = Journal(Directory(str(tmp_path)), [].append)
    goes_on(failure, lambda: through_stages(
        request_of(model), Workers(number=1, bytes=2**40),
        lambda number: Pool(executor, SETUP, num_workers=number, journal=journal),
    ))  # fmt: skip
    assert executor.left == 0
    stops = TABLE[failure][PLACES.index(Place.NOWHERE_ELSE)][0] is STOP
    assert [event["kind"] for event in journal.events] == ["gave up" if stops else failure]


@pytest.mark.parametrize(
    "failure", [FailureClass.STORAGE_ERROR, FailureClass.NUMERIC_FAILURE, FailureClass.DEFECT]
)
def test_a_stage_is_replaced_whatever_its_call_raised(failure, model, tmp_path):
    compress_local(model, tmp_path / "expected")
    events = []
    executor = FailingExecutor("calibrate.layers 0-1. mb 2", EXAMPLES[failure], times=1)
    compress_local(model, tmp_path / "run", executor=executor, workers=1, listener=events.append)
    told = [event for event in events if event["kind"] == failure]
    assert [event["worker"] for event in told] == ["worker-0"]
    assert [event["unit"] for event in told] == ["calibrate-layers-0-1-sequences-8-11"]
    assert result_files(tmp_path / "run") == result_files(tmp_path / "expected")


def test_the_same_place_in_two_shards_is_not_the_same_work(model, tmp_path):
    crash = EXAMPLES[FailureClass.WORKER_CRASHED]
    executor = FailingExecutor("calibrate.layers 0-1. mb 0", crash, times=2)
    events, recipe = [], {"calibration": {"shards": 2}, "workers": 2}
    compress_local(model, tmp_path, executor=executor, listener=events.append, **recipe)
    crashed = [event for event in events if event["kind"] == "worker crashed"]
    assert executor.left == 0
    assert len({event["unit"] for event in crashed}) == len(crashed) == 2


def test_a_unit_that_every_worker_failed_for_another_reason_is_tried_once_more(model, tmp_path):
    errors = [EXAMPLES[f] for f in (FailureClass.STORAGE_ERROR, FailureClass.NUMERIC_FAILURE)]

    class FailingEachTime(FailingExecutor):
        def call(self, *args, **how):
            self._error = errors[self.left - 1]
            return super().call(*args, **how)

    executor, events = FailingEachTime("layer-00001", None, times=2), []
    compress_local(model, tmp_path, executor=executor, workers=2, listener=events.append)
    failed = [event["worker"] for event in events if event["kind"] in POLICIES]
    assert sorted(failed) == ["worker-0", "worker-1"]
