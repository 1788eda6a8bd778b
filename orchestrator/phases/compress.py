"""Compress: do the basis, layer, embedding and head units, each on any free worker."""

from orchestrator.phases.context import RunContext
from planners.units.units import needed


def compress(context: RunContext) -> None:
    """Do the basis, layer, embedding and head units, all layers at once.

    Raises:
        CompressionError: see `RunContext.do`.
    """
    lasting = [unit for unit in context.made if unit.lasting]
    if not context.ledger.todo(lasting):
        return
    left = needed(context.made, done=context.ledger.done)
    with context.phase("compress", total=len(left)):
        context.do(left)
