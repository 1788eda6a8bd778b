"""Units whose inputs are done go to workers that are free; a lost worker's unit goes to another."""

from collections.abc import Callable, Sequence
from typing import Any

from actors.messages import CompressionJob, UnitTask
from orchestrator.context import RunContext
from orchestrator.executors import WorkerLost
from orchestrator.journal import Journal
from orchestrator.ledger import Ledger
from orchestrator.pool import Pool
from planners.errors import ClusterError
from planners.units import Unit, needed, spent

POLL_SECONDS = 0.5
MAX_ATTEMPTS = 4


class Frontier:
    """Which units may start: pure bookkeeping, so that a simulation can run the same policy."""

    def __init__(self, units: Sequence[Unit], *, is_done: Callable[[Unit], bool]) -> None:
        """Take the units in the order of their priority."""
        self._left = [unit for unit in units if not is_done(unit)]
        self._open = {unit.name for unit in self._left}
        self._running: dict[str, Unit] = {}
        self.attempts: dict[str, int] = {}

    @property
    def finished(self) -> bool:
        """Nothing is left and nothing runs."""
        return not self._left and not self._running

    def start(self) -> Unit | None:
        """Return the next unit whose inputs are done, and count it as running."""
        for unit in self._left:
            if not any(name in self._open for name in unit.inputs):
                self._left.remove(unit)
                self._running[unit.name] = unit
                self.attempts[unit.name] = self.attempts.get(unit.name, 0) + 1
                return unit
        return None

    def finish(self, unit: Unit) -> None:
        """Count a unit as done: those that wait for it may start."""
        del self._running[unit.name]
        self._open.discard(unit.name)

    def give_back(self, unit: Unit) -> None:
        """Put a unit back, before all others: its worker was lost."""
        del self._running[unit.name]
        self._left.insert(0, unit)


def compress(context: RunContext) -> None:
    """Do the basis, layer, embedding and head units, all layers at once.

    Raises:
        CompressionError: see `run_units`.
    """
    lasting = [unit for unit in context.made if unit.lasting]
    if not context.ledger.todo(lasting):
        return
    left = needed(context.made, done=context.ledger.done)
    with context.phase("compress", total=len(left)):
        run_units(context.pool, left, context.job, ledger=context.ledger, journal=context.journal)


def run_units(
    pool: Pool,
    units: Sequence[Unit],
    job: CompressionJob,
    *,
    ledger: Ledger,
    journal: Journal,
) -> None:
    """Do all units that have no record, each on whichever worker is free.

    Raises:
        CompressionError: a unit's own error, or a unit lost its worker too often.
    """
    frontier = Frontier(units, is_done=ledger.done)
    idle = list(range(pool.num_workers))
    running: dict[Any, tuple[int, Unit]] = {}
    while not frontier.finished:
        while idle and (unit := frontier.start()) is not None:
            slot = idle.pop(0)
            task = UnitTask(unit=unit.name, kind=unit.kind, index=unit.index, inputs=unit.inputs)
            running[pool.call(slot, "work", task, job, label=unit.name)] = (slot, unit)
        for ticket in pool.executor.ready(list(running), seconds=POLL_SECONDS):
            slot, unit = running.pop(ticket)
            idle.append(slot)
            try:
                done = pool.executor.result(ticket)
            except WorkerLost as lost:
                _after_loss(frontier, unit, lost)
                pool.replace(slot, lost)
                continue
            frontier.finish(unit)
            pool.saw([done])
            ledger.commit(unit, done, attempt=frontier.attempts[unit.name])
            for passed in spent(unit, units, done=ledger.done):
                ledger.drop(passed)
            journal.tell(unit.kind, unit=unit.name, worker=done.worker,
                         start=done.started, seconds=done.seconds)  # fmt: skip


def _after_loss(frontier: Frontier, unit: Unit, lost: WorkerLost) -> None:
    if frontier.attempts[unit.name] >= MAX_ATTEMPTS:
        raise ClusterError(
            f"{unit.name} lost its worker {MAX_ATTEMPTS} times, the last one with: {lost}",
            hint="what is done is kept; give workers more memory, or run the command again",
        ) from lost
    frontier.give_back(unit)
