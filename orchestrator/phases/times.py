"""Measure how long layers of each width take, where a speed-up is asked for."""

from dataclasses import replace

from orchestrator.phases.context import RunContext
from planners.method import Target
from planners.model.serving_load import times_from
from planners.units.units import times_unit


def measure_times(context: RunContext) -> RunContext:
    """Return a context with the times of layers; itself where no speed-up is asked for.

    Raises:
        PlanError: no cut is as fast as is asked; the message says how fast one can get.
    """
    prepared, target = context.prepared, context.prepared.config.target
    if target.speedup is None:
        return context
    unit = times_unit(
        prepared.identity, target.load, method=prepared.spec.name, options=prepared.options
    )
    if context.ledger.todo([unit]):
        with context.phase("allocate", total=1):
            context.do([unit], load=target.load)
    context = replace(context, times=times_from(context.ledger.record(unit).values["times"]))
    prepared.spec.form(prepared.plan.shape, prepared.start, target_of(context), prepared.options)
    return context


def target_of(context: RunContext) -> Target:
    """Return what is asked of the result, with the times that were measured for it."""
    return replace(context.prepared.target, times=context.times)
