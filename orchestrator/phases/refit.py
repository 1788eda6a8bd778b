"""The second pass: refit drafted layers to dense activations, and keep the better ones."""

from collections.abc import Sequence

from orchestrator.phases.context import RunContext
from orchestrator.phases.evaluate import Loss
from planners.units.units import Unit


def refit(context: RunContext) -> None:
    """Refit the drafted layers if the recipe asks for it, and make the better ones the result.

    Raises:
        CompressionError: see `RunContext.do`.
    """
    chain, chosen = context.refitting
    _reopen(context, chain)
    units = [*chain, *chosen]
    num_left = len(context.ledger.todo(units))
    if num_left:
        with context.phase("refit", total=num_left):
            context.do(units)
    if chain:
        for name in context.run.names("boundary"):
            if name.startswith("boundary/refit-"):
                context.run.delete(name)


def refit_losses(context: RunContext) -> tuple[dict[str, Loss], bool]:
    """Return the losses of the dense, drafted and refitted models, and if the refit is used."""
    values = context.ledger.record(context.refitting[0][-1]).values
    nats, num_tokens, used = values["nats"], values["num_tokens"], values["used"]
    assert isinstance(nats, dict)  # written by our own unit
    assert isinstance(num_tokens, int)
    return {n: Loss(nats=each, num_tokens=num_tokens) for n, each in nats.items()}, bool(used)


def _reopen(context: RunContext, chain: Sequence[Unit]) -> None:
    """Reopen units of the chain whose boundary was removed although the next unit needs it.

    A boundary is removed once the next layer has read it, so it is not among a record's files.
    """
    needed = False
    for unit in reversed(chain):
        if needed and context.ledger.done(unit) and not _left_boundary(context, unit):
            context.ledger.forget(unit)
        needed = not context.ledger.done(unit)


def _left_boundary(context: RunContext, unit: Unit) -> bool:
    files = context.ledger.record(unit).values["boundary"]
    assert isinstance(files, list)  # written by our own units
    return all(context.run.size(file["path"]) == file["bytes"] for file in files)
