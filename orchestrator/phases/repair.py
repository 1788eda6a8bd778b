"""A result with a wrong byte is made whole before it is READY, by redoing only what that takes."""

from orchestrator.phases.allocate import allocate, measuring
from orchestrator.phases.context import RunContext
from orchestrator.phases.shrink import shrink
from orchestrator.phases.stitch import stitch_unit
from planners.errors import StorageError
from planners.units.kinds import KINDS, MODEL, STATISTICS
from planners.units.units import Unit

REPAIRS = 2  # a disk that spoils the same files again and again is to be replaced


def skip_unneeded(context: RunContext) -> None:
    """Count units as done whose files were dropped, unless something that is left to do reads them.

    So a layer file that is lost after READY, when the statistics are gone, costs the statistics of
    its own layer, not those of all.
    """
    context.ledger.mark_unneeded([])  # what was spared before may be read now
    form = _known_widths(context)
    if form is None:
        return
    made = [*context.sums, *form.made]
    left = _needed(made, form)
    dropped = [u for u in made if u.name not in left and not context.ledger.done(u)]
    context.ledger.mark_unneeded([unit for unit in dropped if context.ledger.is_known(unit)])


def repair_result(context: RunContext) -> None:
    """Compare every byte of the result with its records, and do again what is not as recorded.

    Raises:
        StorageError: the same storage spoils what is written again and again.
        CompressionError: a unit's own error.
    """
    for _ in range(REPAIRS):
        if not corrupt_files(context):
            return
        skip_unneeded(context)
        shrink(context, choose_widths=lambda allocated: allocated)
    verify_bytes(context)


def verify_bytes(context: RunContext) -> None:
    """Compare every byte of the result with its records.

    Raises:
        StorageError: a file is not as recorded.
    """
    wrong = corrupt_files(context)
    if wrong:
        raise StorageError(
            f"{context.run.path(wrong[0])}: is not what was written there"
            + (f"; nor are {len(wrong) - 1} other files" if wrong[1:] else ""),
            hint="run the same command again, which does these files again; where it comes back, "
            "the storage is at fault",
        )


def corrupt_files(context: RunContext) -> list[str]:
    """Return the files of the result that are not as recorded; their units count as not done."""
    wrong = context.ledger.corrupt_files([*context.units, stitch_unit(context)])
    if wrong:
        context.journal.emit("damaged", detail=", ".join(wrong))
    return wrong


def _known_widths(context: RunContext) -> RunContext | None:
    """Return the context with the widths that an earlier driver fixed, if its numbers are here."""
    prepared, ledger = context.prepared, context.ledger
    if prepared.options.get("refit"):
        return None  # its units pass streams on that are no unit's files
    if not all(ledger.is_known(unit) for unit in context.sums if unit.taps):
        return None
    if not all(ledger.done(unit) for unit in measuring(context)):
        return None
    return allocate(context)


def _needed(made: list[Unit], context: RunContext) -> set[str]:
    """Return the units that are not done and lead to a file of the result, or to its report."""
    by_name = {unit.name: unit for unit in made}
    needed: set[str] = set()
    wanted = {MODEL, STATISTICS} if context.prepared.config.keep_statistics else {MODEL}
    # A basis nobody reads any more has numbers for the report: without its record they are lost.
    left = [
        unit
        for unit in made
        if KINDS[unit.kind].leaves in wanted or (unit.lasting and not context.ledger.is_known(unit))
    ]
    while left:
        unit = left.pop()
        if unit.name not in needed and not context.ledger.done(unit):
            needed.add(unit.name)
            # What carried statistics read is of the step before, which is seen to by itself.
            left += [by_name[name] for name in unit.inputs if name in by_name]
    return needed
