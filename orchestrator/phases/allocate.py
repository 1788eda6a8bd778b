"""Allocate the widths of every layer within the budget, from a few measured numbers a layer."""

import json
from collections.abc import Mapping
from dataclasses import replace

from orchestrator.phases.context import RunContext
from orchestrator.phases.times import target_of
from planners.budget.candidates import NAME as CANDIDATES
from planners.budget.served import pair_order
from planners.canonical_json import to_json
from planners.errors import NumericsError, PlanError
from planners.overflow import found_behind
from planners.units.units import Unit, damage_units, losses_units


def allocate(context: RunContext) -> RunContext:
    """Return a context with its final widths; first measure what the method needs for them.

    Raises:
        PlanError: the budget cannot be met.
        CompressionError: a layer could not be measured.
    """
    prepared = context.prepared
    spec, options = prepared.spec, prepared.options
    if spec.allocate is None or not spec.measures(options):
        if context.times is None:
            return replace(context, form=prepared.plan.form)
        form = spec.form(prepared.plan.shape, prepared.start, target_of(context), options)
        return replace(context, form=form)
    findings = _findings(context, measured(context))
    try:
        allocation = spec.allocate(
            prepared.plan.shape, prepared.start, target_of(context), options, findings
        )
    except NumericsError as error:
        raise found_behind(error, prepared.identity.batching.dtype) from error
    content = {
        "measured": spec.measures(options),
        "findings": _small(findings),
        "form": to_json(allocation.form),
        **({"makers": to_json(allocation.makers)} if allocation.makers else {}),
        "servable": allocation.servable,
        "damages": dict(allocation.damages),
    }
    context.run.write("allocation.json", json.dumps(content, indent=1, sort_keys=True).encode())
    return replace(
        context,
        form=allocation.form,
        makers=allocation.makers,
        served={"as": allocation.servable, "damages": dict(allocation.damages)},
    )


def _findings(context: RunContext, units: list[Unit]) -> list[Mapping[str, object]]:
    """Return the measurements of each layer, with those of all competing methods."""
    joining = _joining(context)
    findings: list[Mapping[str, object]] = []
    for own, *others in zip(units[: len(context.sums)], *joining.values(), strict=True):
        found = dict(context.ledger.record(own).values)
        found.setdefault("pair_scores", _pair_scores(context, len(findings)))
        if others:
            curves = [context.ledger.record(unit).values["curves"] for unit in others]
            found[CANDIDATES] = dict(zip(joining, curves, strict=True))
        findings.append(found)
    return findings


def measured(context: RunContext) -> list[Unit]:
    """Return the units whose records hold the measurements; do those that have no record."""
    units = measuring(context)
    if not units:
        return list(context.sums)
    left = context.ledger.todo(units)
    if left:
        joining = _joining(context)
        with context.phase("allocate", total=len(left)):
            order = _pair_order(context)
            context.do(units[: len(context.sums)], pair_order=order)
            for other in context.prepared.spec.candidates[1:]:
                context.do(joining[other.spec.name], method=other.spec.name, options=other.options)
    return units


def measuring(context: RunContext) -> list[Unit]:
    """Return the measuring units; none where the statistics alone are enough."""
    spec, options = context.prepared.spec, context.prepared.options
    wanted = spec.measures(options)
    if wanted in ("", "influence"):
        return []
    if wanted == "damage":
        own = damage_units(context.sums, method=spec.name, revision=spec.revision, options=options)
        return [*own, *(unit for each in _joining(context).values() for unit in each)]
    if wanted == "losses":
        return losses_units(
            context.sums,
            method=spec.name,
            revision=spec.revision,
            modules=spec.shrinks(options),
            form=context.prepared.plan.form,
        )
    raise PlanError(f"{spec.name}: no unit measures {wanted!r}")


def _joining(context: RunContext) -> dict[str, list[Unit]]:
    """Return competing method -> the units that measure its cuts."""
    return {
        each.spec.name: damage_units(
            context.sums,
            method=each.spec.name,
            revision=each.spec.revision,
            options=each.options,
            by=each.spec.name,
        )
        for each in context.prepared.spec.candidates[1:]
    }


def _pair_scores(context: RunContext, layer: int) -> object:
    return context.ledger.record(context.sums[layer]).values.get("pair_scores")


def _pair_order(context: RunContext) -> tuple[int, ...]:
    """Return the rope pairs, the most important of the model first; empty if not measured."""
    scores = [{"pair_scores": _pair_scores(context, unit.index)} for unit in context.sums]
    return tuple(pair_order(scores))


def _small(findings: list[Mapping[str, object]]) -> list[dict[str, object]]:
    names = ("influence", "curves", "losses", "pair_scores", "tables", CANDIDATES)
    return [{name: f[name] for name in names if name in f} for f in findings]
