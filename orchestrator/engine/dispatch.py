"""Dispatch units to free workers once their inputs are done; retry a lost worker's unit."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.messages import CompressionJob, UnitDone, UnitTask
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.engine.failure_policy import FAILURES, Action, Place
from orchestrator.engine.reproduce import Reproducer, UnitCall
from orchestrator.engine.stalls import PendingCalls
from orchestrator.engine.supervisor import Call
from orchestrator.engine.worker_pool import Pool
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.ledger import Ledger
from planners.units.frontier import Frontier
from planners.units.units import Unit, spent


def run_units(
    pool: Pool,
    units: Sequence[Unit],
    job: CompressionJob,
    *,
    ledger: Ledger,
    journal: Journal,
) -> None:
    """Do all units that have no record, each on any free worker.

    Raises:
        CompressionError: a unit's own error, or a unit failed the same way too often.
        KeyboardInterrupt: the user requested a stop; the units that were running have records.
    """
    _Dispatch(pool, units, job, ledger=ledger, journal=journal).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A call for a unit: to compute it, or to answer once its files are written."""

    slot: int
    unit: Unit
    writes: bool


class _Dispatch:
    """The running units of one phase.

    A worker computes a unit while it still writes the files of the one before, and reads those of
    the one that will probably follow. A unit has a record only once its files are durable: when the
    second of its two calls has answered.

    A unit runs on one slot, or on two if the first does not answer in time: the first answer
    counts. Both write the same bytes under the same name.
    """

    def __init__(
        self,
        pool: Pool,
        units: Sequence[Unit],
        job: CompressionJob,
        *,
        ledger: Ledger,
        journal: Journal,
    ) -> None:
        self._pool, self._job, self._ledger, self._journal = pool, job, ledger, journal
        self._units = units
        self._frontier = Frontier(units, is_done=ledger.done)
        self._running: dict[Any, _Running] = {}
        self._ahead: dict[int, str] = {}  # slot -> unit whose files its worker reads ahead
        self._failed_on: dict[str, set[int]] = {}  # unit -> slots whose workers failed it
        self._pending = PendingCalls(pool)

    def run(self) -> None:
        """Return when all units have a record."""
        while not self._frontier.finished:
            if not self._pool.interruption.requested:
                self._feed()
            elif not self._running:
                raise KeyboardInterrupt
            for ticket in self._pool.ready(list(self._running)):
                if ticket in self._running:  # else its slot was replaced in this round
                    self._take(ticket)
            self._leave_draining_nodes()
            self._handle_stalled()

    def _feed(self) -> None:
        for slot in self._idle():
            unit = self._next(slot)
            if unit is not None:
                self._frontier.begin(unit)
                self._start(slot, unit)

    def _next(self, slot: int, *, assuming: Collection[str] = ()) -> Unit | None:
        """Return the unit that a worker should do next, if possible not one that others read.

        Of units of one kind it does the one that it has read ahead.
        """
        left = self._left_to_others(slot)
        others = [unit for at, unit in self._ahead.items() if at != slot]
        found = self._frontier.next(avoid=[*left, *others], assuming=assuming)
        if found is None:
            return self._frontier.next(avoid=left, assuming=assuming)
        ahead = self._frontier.startable(self._ahead.get(slot, ""))
        is_like = ahead is not None and ahead.kind == found.kind and ahead.name not in left
        return ahead if is_like else found

    def _left_to_others(self, slot: int) -> list[str]:
        """Return the units that failed on this slot and have other slots left to run on."""
        return [
            unit
            for unit, slots in self._failed_on.items()
            if slot in slots and len(slots) < self._pool.num_workers
        ]

    def _idle(self) -> list[int]:
        busy = {running.slot for running in self._running.values()}
        return [slot for slot in self._pool.open_slots if slot not in busy]

    def _start(self, slot: int, unit: Unit) -> None:
        self._ahead.pop(slot, None)
        ahead = self._next(slot, assuming=self._frontier.running)
        task = None
        if ahead is not None:
            self._ahead[slot], task = ahead.name, task_of(ahead)
        ticket = self._pool.call(slot, "work", task_of(unit), self._job, task, label=unit.name)
        self._add(ticket, _Running(slot=slot, unit=unit, writes=False))

    def _add(self, ticket: Any, running: _Running) -> None:
        self._running[ticket] = running
        self._pending.begins(running.slot, ticket, running.unit.kind, running.unit.name)

    def _take(self, ticket: Any) -> None:
        running = self._running.pop(ticket)
        slot, unit = running.slot, running.unit
        try:
            done = self._pool.executor.result(ticket)
        except FAILURES as error:
            self._fail(slot, self._blamed(slot, ticket, unit, error), error)
            return
        self._pending.answered(slot, ticket, counts=False)
        if running.writes:
            self._pending.took(unit.kind, done.seconds)
            self._finish(unit, done)
        else:
            self._begin_next(slot, unit)
            written = self._pool.call(slot, "written", unit.name, label=f"{unit.name} files")
            self._add(written, _Running(slot=slot, unit=unit, writes=True))

    def _blamed(self, slot: int, ticket: Any, unit: Unit, error: Exception) -> Unit:
        """Return the unit that a failure is of: the one its worker was busy with, if it is lost."""
        first = self._pending.ticket(slot)
        self._pending.answered(slot, ticket, counts=False)
        doing = self._running.get(first)
        return unit if doing is None or not isinstance(error, WorkerLost) else doing.unit

    def _begin_next(self, slot: int, unit: Unit) -> None:
        """Let a worker compute while the files of the unit that it has computed are written.

        Not if a unit that reads them would go first: it must wait for them.
        """
        if self._pool.interruption.requested or slot not in self._pool.open_slots:
            return
        following = self._next(slot)
        if following is not None and following is self._next(slot, assuming=[unit.name]):
            self._frontier.begin(following)
            self._start(slot, following)

    def _finish(self, unit: Unit, done: UnitDone) -> None:
        self._frontier.finish(unit)
        self._pool.record_peaks([done])
        met = self._pool.supervisor.finish(unit.name)
        if met:
            done = replace(done, values={**done.values, "retried_after": met})
        self._ledger.commit(unit, done, attempt=self._frontier.attempts[unit.name])
        for passed in spent(unit, self._units, done=self._ledger.done):
            self._ledger.drop(passed)
        self._journal.emit(unit.kind, unit=unit.name, worker=done.worker,
                           start=done.started, seconds=done.seconds,
                           peak_bytes=done.peak_bytes,
                           written_bytes=done.written_bytes)  # fmt: skip
        for slot in self._slots_of(unit):  # the other of two: its answer is not needed
            self._leave(slot)
            self._pool.renew(slot, listens=False)

    def _fail(self, slot: int, unit: Unit, error: Exception) -> None:
        """Put a unit back in the queue, and replace its worker where that is needed.

        Raises:
            CompressionError: the run stops.
        """
        if self._pool.supervisor.handle(self._failed(slot, unit), error) is Action.REPLACE:
            self._leave(slot)
            self._pool.replace(slot, error)
        else:
            self._failed_on.setdefault(unit.name, set()).add(slot)
        self._give_back()

    def _failed(self, slot: int, unit: Unit) -> Call:
        """Return a unit on a worker as a `Call` for the supervisor."""
        setup = self._pool.setup(slot)
        return Call(
            name=unit.name,
            place=Place.ANY_WORKER if self._pool.num_workers > 1 else Place.NOWHERE_ELSE,
            worker=setup.name,
            reproducer=Reproducer(
                setup=setup,
                call=UnitCall(task=task_of(unit), job=self._job),
                inputs=unit.inputs,
                fingerprint=unit.fingerprint,
            ),
        )

    def _leave(self, slot: int) -> None:
        """Forget all calls on a slot; its units that run nowhere else are put back."""
        self._running = {t: each for t, each in self._running.items() if each.slot != slot}
        self._ahead.pop(slot, None)
        self._pending.forget(slot)
        for slots in self._failed_on.values():
            slots.discard(slot)  # its next worker has failed nothing
        self._give_back()

    def _give_back(self) -> None:
        """Put the units back in the queue that no worker has any more."""
        held = {running.unit.name for running in self._running.values()}
        for name in [name for name in self._frontier.running if name not in held]:
            self._frontier.give_back(name)

    def _slots_of(self, unit: Unit) -> list[int]:
        return [each.slot for each in self._running.values() if each.unit is unit]

    def _leave_draining_nodes(self) -> None:
        """Let units finish that fit in the time left; move the others to other nodes at once."""
        busy = {running.slot for running in self._running.values()}
        for slot in range(self._pool.num_workers):
            left = self._pool.seconds_left(slot)
            if left is None or (slot in busy and self._pending.fits(slot, left)):
                continue
            self._leave(slot)
            self._pool.leave_node(slot)

    def _handle_stalled(self) -> None:
        """Start a late unit on an idle worker too; replace a worker that stays silent."""
        for slot in sorted({running.slot for running in self._running.values()}):
            unit = self._running[self._pending.ticket(slot)].unit
            if self._pending.stalled(slot):
                lost = WorkerLost(FailureClass.STALLED, f"{unit.name} did not answer")
                self._fail(slot, unit, lost)
            elif self._pending.late(slot) and len(self._slots_of(unit)) == 1:
                for idle in self._idle()[:1]:
                    self._start(idle, unit)


def task_of(unit: Unit) -> UnitTask:
    """Return the message that describes a unit to a worker."""
    return UnitTask(
        unit=unit.name,
        kind=unit.kind,
        index=unit.index,
        inputs=unit.inputs,
        suffix=unit.suffix,
    )
