"""The phases between an input model and its result, in order; a new phase is added here only."""

from collections.abc import Callable

from orchestrator.phases.allocate import allocate
from orchestrator.phases.calibrate import calibrate
from orchestrator.phases.compress import compress
from orchestrator.phases.context import RunContext
from orchestrator.phases.recover import recover
from orchestrator.phases.refit import refit
from orchestrator.phases.stitch import stitch


def shrink(
    context: RunContext, *, choose_widths: Callable[[RunContext], RunContext] = allocate
) -> RunContext:
    """Do what is left of each phase, and return the context with the widths of the result.

    Args:
        context: a run or a step of one; units that have a record are not done again.
        choose_widths: called after calibration; returns the context with its widths.

    Raises:
        CompressionError: see `planners.errors`; finished units keep their records.
    """
    calibrate(context)
    context = choose_widths(context)
    if not context.is_idle:
        compress(context)
        refit(context)
        recover(context)
        stitch(context)
    return context
