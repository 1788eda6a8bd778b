"""Units whose inputs are done go to workers that are free; a lost worker's unit goes to another."""

from collections.abc import Sequence
from typing import Any

from actors.messages import CompressionJob, UnitTask
from orchestrator.context import RunContext
from orchestrator.executors import WorkerLost
from orchestrator.journal import Journal
from orchestrator.ledger import Ledger
from orchestrator.pool import Pool
from planners.errors import ClusterError
from planners.frontier import Frontier
from planners.units import Unit, needed, spent

POLL_SECONDS = 0.5
MAX_ATTEMPTS = 4


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
