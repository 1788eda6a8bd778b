"""Measure how long layers of each width take, where a speed-up is asked for."""

from dataclasses import asdict, replace
from typing import Any

from orchestrator.phases.context import RunContext
from planners.budget.budgets import budget_of
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


def promised(context: RunContext) -> dict[str, Any]:
    """Return the speed or memory of the result by the formulas; empty if neither was asked."""
    target, start = target_of(context), context.prepared.start
    asked = target.speedup or target.fit
    if asked is None:
        return {}
    budget = budget_of(context.prepared.plan.shape, start, target)
    cost = budget.cost(context.form)
    name = "speedup" if target.speedup else "fit"
    value = budget.cost(start.form) / cost if target.speedup else cost
    return {"of": name, "asked": asked, "promised": value, **asdict(target.load)}


def target_of(context: RunContext) -> Target:
    """Return what is asked of the result, with the times that were measured for it."""
    return replace(context.prepared.target, times=context.times)
