"""Find corrupt files of a result before it is READY, and recompute only the units they need."""

from orchestrator.phases.allocate import allocate, measuring
from orchestrator.phases.context import RunContext
from orchestrator.phases.shrink import shrink
from orchestrator.phases.stitch import stitch_unit
from planners.errors import StorageError
from planners.units.kinds import KINDS, MODEL, STATISTICS
from planners.units.units import Unit

REPAIRS = 2  # a disk that corrupts the same files again and again must be replaced


def skip_unneeded(context: RunContext) -> None:
    """Count units whose files were removed as done, unless an unfinished unit reads them.

    So after READY, when the statistics are removed, a lost layer file costs recomputing the
    statistics of its own layer, not those of all layers.
    """
    context.ledger.mark_unneeded([])  # a unit skipped earlier may be needed now
    form = _known_widths(context)
    if form is None:
        return
    made = [*context.sums, *form.made]
    left = _needed(made, form)
    dropped = [u for u in made if u.name not in left and not context.ledger.done(u)]
    context.ledger.mark_unneeded([unit for unit in dropped if context.ledger.is_known(unit)])


def repair_result(context: RunContext) -> None:
    """Compare every byte of the result with its records, and recompute what differs.

    Raises:
        StorageError: the storage repeatedly corrupts what is written.
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
        StorageError: a file differs from its record.
    """
    wrong = corrupt_files(context)
    if wrong:
        raise StorageError(
            f"{context.run.path(wrong[0])}: differs from what was written"
            + (f"; so do {len(wrong) - 1} other files" if wrong[1:] else ""),
            hint="run the same command again to recompute them; if it happens again, the storage "
            "is faulty",
        )


def corrupt_files(context: RunContext) -> list[str]:
    """Return the files of the result that differ from their records; reopen their units."""
    wrong = context.ledger.corrupt_files([*context.units, stitch_unit(context)])
    if wrong:
        context.journal.emit("damaged", detail=", ".join(wrong))
    return wrong


def _known_widths(context: RunContext) -> RunContext | None:
    """Return the context with the widths that an earlier driver chose, if its records exist."""
    prepared, ledger = context.prepared, context.ledger
    if prepared.options.get("refit") or prepared.recovery is not None:
        return None  # their units pass on activations that are not among the files of any unit
    if not all(ledger.is_known(unit) for unit in context.sums if unit.taps):
        return None
    if not all(ledger.done(unit) for unit in measuring(context)):
        return None
    return allocate(context)


def _needed(made: list[Unit], context: RunContext) -> set[str]:
    """Return the unfinished units that a file of the result, or its report, depends on."""
    by_name = {unit.name: unit for unit in made}
    needed: set[str] = set()
    wanted = {MODEL, STATISTICS} if context.prepared.config.keep_statistics else {MODEL}
    # The report has numbers of each basis: without the record of a basis they are lost.
    left = [
        unit
        for unit in made
        if KINDS[unit.kind].leaves in wanted or (unit.lasting and not context.ledger.is_known(unit))
    ]
    while left:
        unit = left.pop()
        if unit.name not in needed and not context.ledger.done(unit):
            needed.add(unit.name)
            # Carried statistics read files of the step before, which is repaired separately.
            left += [by_name[name] for name in unit.inputs if name in by_name]
    return needed
