"""A pass on workers and inputs that get lost at any moment: the sums are the same bits."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.layer_units import reads
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.backend.executor import ActorLocation, FailureClass, InputLost, WorkerLost
from orchestrator.backend.local import LocalExecutor
from orchestrator.engine.failure_policy import POLICIES
from planners.errors import ClusterError
from tests.builders import compress_local, perplexity, save_model, worker_gib
from tests.strategies import whole_runs

EVERYTHING = ("load", "step", "publish", "work", "written", "input")


class UnreliableExecutor(LocalExecutor):
    """Runs calls in this process, answers in any order, and loses workers and what they made.

    It keeps to what Ray promises: calls on one worker answer in the order made; a worker that is
    gone fails all its calls; the driver learns of it only when it asks.
    """

    def __init__(self, seed, *, max_losses, loss=0.05, during=EVERYTHING):
        self._random = random.Random(seed)
        self._loss, self._left, self._during = loss, max_losses, during
        self._order = itertools.count()
        self.rests = False
        self.num_lost_workers = self.num_lost_inputs = 0

    def spawn(self, actor_class, *args, resources, name):
        return Process(super().spawn(actor_class, *args, resources=resources, name=name))

    def locate(self, handle):
        ticket = Ticket(handle, next(self._order))
        ticket.value = ActorLocation()
        return ticket

    def call(self, handle, method, *args, num_returns=1, label):
        if handle.actor is not None and self._happens(method):
            handle.actor = None
            # Its node went with it, and what it had made and nobody had fetched: or it did not.
            handle.node_is_gone = self._random.random() < 0.5
            self.num_lost_workers += 1
        tickets = [Ticket(handle, next(self._order)) for _ in range(num_returns)]
        if handle.actor is None:
            tickets[0].error = WorkerLost(FailureClass.NODE_LOST, label)
        elif any(isinstance(arg, Ticket) and self._is_lost(arg) for arg in args):
            self.num_lost_inputs += 1
            tickets[0].error = InputLost(label)
        else:
            values = [arg.value if isinstance(arg, Ticket) else arg for arg in args]
            answer = getattr(handle.actor, method)(*values)
            for ticket, part in zip(tickets, answer if num_returns > 1 else [answer], strict=True):
                ticket.value = part
        return tickets[0] if num_returns == 1 else tuple(tickets)

    def ready(self, tickets, *, seconds):
        del seconds
        first = {}
        for ticket in sorted(tickets, key=lambda ticket: ticket.order):
            first.setdefault(ticket.process, ticket)
        return self._random.sample(list(first.values()), self._random.randint(1, len(first)))

    def result(self, ticket):
        if ticket.process.actor is None and self._random.random() < 0.5:
            raise WorkerLost(FailureClass.NODE_LOST, "before its answer arrived")
        if ticket.error is not None:
            raise ticket.error
        return ticket.value

    def rest_during_evaluation(self, event):
        """Lose nothing while models are evaluated; this is a listener."""
        if event["kind"] == "phase begins":
            self.rests = event["unit"] == "evaluate"

    def _is_lost(self, ticket):
        return ticket.process.node_is_gone or self._happens("input")

    def _happens(self, what):
        if (
            not self.rests
            and what in self._during
            and self._left
            and self._random.random() < self._loss
        ):
            self._left -= 1
            return True
        return False


class CountingExecutor(LocalExecutor):
    """Counts the calls that were made, by method."""

    def __init__(self):
        self.num_calls = Counter()

    def call(self, handle, method, *args, num_returns=1, label):
        self.num_calls[method] += 1
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


class Process:
    def __init__(self, actor):
        self.actor = actor
        self.node_is_gone = False


class Ticket:
    def __init__(self, process, order):
        self.process, self.order = process, order
        self.value = self.error = None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return out


def assert_same(out, expected):
    """Compare sums, result and losses, to the last bit."""
    for folder in ("stats", "basis", "model"):
        found, wanted = (
            {p.name: p.read_bytes() for p in (run / folder).iterdir()} for run in (out, expected)
        )
        assert found == wanted
    for name in ("dense", "compressed"):
        assert perplexity(out, name) == perplexity(expected, name)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_nothing_is_computed_twice_while_nothing_is_lost(model, tmp_path, workers):
    executor = CountingExecutor()
    compress_local(model, tmp_path, executor=executor, workers=workers)
    # 20 sequences of calibration and 7 of evaluation, dense and compressed, by 4.
    assert executor.num_calls == {
        "load": 3 * workers,
        "step": (5 + 2 + 2) * workers,
        "publish": 4,
        "work": 9 + 4 + 2,  # sites, layers, embedding and head
        "written": 4 + 9 + 4 + 2,
    }


SEEDS, WORKERS = st.integers(0, 2**32), st.integers(1, 4)


@whole_runs(one_in=8)
@given(seed=SEEDS, workers=WORKERS)
def test_losses_at_any_moment_change_no_bit(model, undisturbed, tmp_path_factory, seed, workers):
    out = tmp_path_factory.mktemp("disturbed")
    executor = UnreliableExecutor(seed, max_losses=12, loss=0.05)
    compress_local(model, out, executor=executor, workers=workers)
    assert_same(out, undisturbed)


@whole_runs(one_in=12)
@given(seed=SEEDS, workers=WORKERS, num_layers=st.integers(1, 2))
def test_nor_do_losses_in_any_wave(model, undisturbed, tmp_path_factory, seed, workers, num_layers):
    out = tmp_path_factory.mktemp("disturbed")
    executor = UnreliableExecutor(seed, max_losses=12, loss=0.05)
    memory = worker_gib(model, num_layers=num_layers)
    compress_local(
        model, out, executor=executor, workers=workers, worker_gib=memory,
        listener=executor.rest_during_evaluation,
    )  # fmt: skip
    assert_same(out, undisturbed)


def test_nor_does_an_input_that_is_lost_in_the_second_wave_of_an_evaluation(
    model, undisturbed, tmp_path
):
    executor = UnreliableExecutor(0, max_losses=1, loss=1.0, during=("input",))
    steps = []

    def begin_with_the_second_wave(event):
        steps.extend([event] if event["kind"] == "evaluate" else [])
        executor.rests = len(steps) < 4  # two parts went through two stages

    memory = worker_gib(model, num_layers=1)
    compress_local(
        model, tmp_path, executor=executor, workers=2, worker_gib=memory,
        listener=begin_with_the_second_wave,
    )  # fmt: skip
    assert executor.num_lost_inputs == 1
    assert_same(tmp_path, undisturbed)


def test_lost_workers_and_inputs_are_told_and_made_good(model, undisturbed, tmp_path):
    events = []
    executor = UnreliableExecutor(1, max_losses=12, loss=0.2)
    compress_local(model, tmp_path, executor=executor, workers=3, listener=events.append)
    assert executor.num_lost_inputs
    lost = [event for event in events if event["kind"] == "node lost"]
    assert len(lost) == executor.num_lost_workers > 0
    assert {event["worker"] for event in lost} <= {"worker-0", "worker-1", "worker-2"}
    assert_same(tmp_path, undisturbed)


def test_a_unit_whose_worker_was_lost_is_tried_again_and_its_record_says_so(model, tmp_path):
    executor = UnreliableExecutor(3, max_losses=3, loss=0.5, during=("work",))
    compress_local(model, tmp_path, executor=executor, workers=2)
    attempts = [r.attempt for r in read_records(Directory(str(tmp_path))).values()]
    # A worker is lost with the unit that it computes, and perhaps one whose files it writes.
    again, lost = sum(attempts) - len(attempts), executor.num_lost_workers
    assert lost <= again <= 2 * lost


def test_a_unit_that_loses_every_worker_ends_the_run_and_is_named(model, tmp_path):
    executor = UnreliableExecutor(0, max_losses=10_000, loss=1.0, during=("work",))
    with pytest.raises(ClusterError, match=r"basis-site-\d+ lost its worker 4 times") as caught:
        compress_local(model, tmp_path, executor=executor, workers=2)
    assert "finished work is kept" in caught.value.hint
    compress_local(model, tmp_path)  # and the same command goes on


def test_a_pass_that_loses_every_worker_ends_the_run(model, tmp_path):
    executor = UnreliableExecutor(0, max_losses=10_000, loss=0.7, during=("load", "step"))
    with pytest.raises(ClusterError, match="workers were lost") as caught:
        compress_local(model, tmp_path, executor=executor, workers=2)
    assert "finished work is kept" in caught.value.hint
    assert executor.num_lost_workers == POLICIES[FailureClass.NODE_LOST].budget + 1


class OrderedExecutor(LocalExecutor):
    """Notes the calls that do units, in order: method, unit, and the unit to be read ahead."""

    def __init__(self):
        self.calls = []

    def call(self, handle, method, *args, num_returns=1, label):
        if method == "work":
            task, _, ahead = args
            self.calls.append((method, task.unit, "" if ahead is None else ahead.unit))
        elif method == "written":
            self.calls.append((method, args[0], ""))
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


def test_the_next_unit_is_computed_and_the_one_after_it_read_while_one_is_written(model, tmp_path):
    executor = OrderedExecutor()
    compress_local(model, tmp_path, executor=executor, method="modegpt", keep_fraction=0.8)
    work = [call for call in executor.calls if call[0] == "work"]
    layers = [unit for _, unit, _ in work if unit.startswith("layer-")]
    order = [(method, unit) for method, unit, _ in executor.calls]
    for unit, following in itertools.pairwise(layers):
        assert order.index(("work", following)) < order.index(("written", unit))
    ahead = {unit: read for _, unit, read in work}
    assert [ahead[unit] for unit, _ in itertools.pairwise(layers)] == layers[1:]


def test_a_unit_that_needs_a_file_waits_for_its_record(model, tmp_path):
    executor = OrderedExecutor()
    options = {"schedule": "sequential", "shards": 1}
    compress_local(model, tmp_path, executor=executor, options=options)
    order = [(method, unit) for method, unit, _ in executor.calls]
    for site in range(1, 9):
        read = ("written", f"basis-site-{site - 1:05d}")
        assert order.index(read) < order.index(("work", f"stream-site-{site:05d}-shard-00000"))


class TightExecutor(LocalExecutor):
    """Gives its workers no room for other units than the one that they compute."""

    def call(self, handle, method, *args, num_returns=1, label):
        if method == "work":
            task, job, ahead = args
            args = (task, replace(job, in_flight_bytes=0), ahead)
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


@pytest.mark.parametrize("size", [{"slice": 0.25}, {"method": "modegpt", "keep_fraction": 0.8}])
def test_what_is_read_ahead_is_read_once_and_changes_no_bit(model, tmp_path, monkeypatch, size):
    read = Counter()
    open_tensor, open_file = Checkpoint.read, reads.map_tensors

    def counting_read(self, name):
        read[self.directory.uri == str(model), name] += 1
        return open_tensor(self, name)

    def counting_map(directory, file):
        read[file.path] += 1
        return open_file(directory, file)

    monkeypatch.setattr(Checkpoint, "read", counting_read)
    monkeypatch.setattr(reads, "map_tensors", counting_map)
    found = {}
    for executor in (LocalExecutor(), TightExecutor()):
        name = type(executor).__name__
        compress_local(model, tmp_path / name, executor=executor, **size)
        files = sorted((tmp_path / name / "model").glob("*.safetensors"))
        found[name] = (dict(read), [file.read_bytes() for file in files])
        read.clear()
    (ahead, result), (in_turn, expected) = found.values()
    assert {name: count for name, count in ahead.items() if count != in_turn[name]} == {}
    assert ahead.keys() == in_turn.keys()
    assert result == expected
