"""A pass on workers and inputs that get lost at any moment: the sums are the same bits."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.executors import InputLost, LocalExecutor, WorkerLost
from orchestrator.pool import MAX_LOSSES
from planners.errors import ClusterError
from tests.builders import compress_local, perplexity, result_files, save_model


class UnreliableExecutor(LocalExecutor):
    """Runs calls in this process, answers in any order, and loses workers and what they made.

    It keeps to what Ray promises: calls on one worker answer in the order made; a worker that is
    gone fails all its calls; the driver learns of it only when it asks.
    """

    def __init__(self, seed, *, max_losses, loss=0.05):
        self._random = random.Random(seed)
        self._loss, self._left = loss, max_losses
        self.num_lost_workers = self.num_lost_inputs = 0

    def spawn(self, actor_class, *args, resources, name):
        return Process(super().spawn(actor_class, *args, resources=resources, name=name))

    def call(self, handle, method, *args, num_returns=1, label):
        if self._happens():
            handle.actor = None
            # Its node went with it, and what it had made and nobody had fetched: or it did not.
            handle.node_is_gone = self._random.random() < 0.5
            self.num_lost_workers += 1
        tickets = [Ticket(handle) for _ in range(num_returns)]
        handle.unanswered.append(tickets[0])
        if handle.actor is None:
            tickets[0].error = WorkerLost("worker lost", label)
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
        first = [t for t in tickets if t.process.unanswered[0] is t]
        return self._random.sample(first, self._random.randint(1, len(first)))

    def result(self, ticket):
        ticket.process.unanswered.remove(ticket)
        if (
            ticket.process.actor is None
            and ticket.value is not None
            and self._random.random() < 0.5
        ):
            raise WorkerLost("worker lost", "before its answer arrived")
        if ticket.error is not None:
            raise ticket.error
        return ticket.value

    def _is_lost(self, ticket):
        return ticket.process.node_is_gone or self._happens()

    def _happens(self):
        if self._left and self._random.random() < self._loss:
            self._left -= 1
            return True
        return False


class Process:
    def __init__(self, actor):
        self.actor = actor
        self.node_is_gone = False
        self.unanswered = []


class Ticket:
    def __init__(self, process):
        self.process = process
        self.value = self.error = None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return out


def statistics(out):
    return {p.name: p.read_bytes() for p in (out / "stats").iterdir()}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 4))
def test_losses_at_any_moment_change_no_bit(model, undisturbed, tmp_path_factory, seed, workers):
    out = tmp_path_factory.mktemp("disturbed")
    executor = UnreliableExecutor(seed, max_losses=10)
    compress_local(model, out, executor=executor, workers=workers)
    assert statistics(out) == statistics(undisturbed)
    assert result_files(out) == result_files(undisturbed)
    for name in ("dense", "compressed"):
        assert perplexity(out, name) == perplexity(undisturbed, name)


def test_what_was_lost_is_told_and_counted(model, tmp_path):
    events = []
    executor = UnreliableExecutor(1, max_losses=12, loss=0.2)
    compress_local(model, tmp_path, executor=executor, workers=3, listener=events.append)
    assert executor.num_lost_workers
    assert executor.num_lost_inputs
    assert {e["kind"] for e in events} >= {"worker lost", "calibrate", "statistics", "layer"}
    records = read_records(Directory(str(tmp_path))).values()
    assert max(record.attempt for record in records) > 1


def test_a_run_that_loses_every_worker_ends_and_says_what_is_kept(model, tmp_path):
    executor = UnreliableExecutor(0, max_losses=10_000, loss=0.7)
    with pytest.raises(ClusterError) as caught:
        compress_local(model, tmp_path, executor=executor, workers=2)
    assert "kept" in caught.value.hint
    assert executor.num_lost_workers <= 3 * MAX_LOSSES
