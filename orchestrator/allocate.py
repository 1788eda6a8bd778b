"""A few floats a layer -> the widths of every layer, exactly within the budget."""

import json
from collections.abc import Mapping

from orchestrator.context import RunContext
from orchestrator.dispatch import run_units
from planners.errors import PlanError
from planners.plan import ModelForm, to_json
from planners.units import Unit, damage_units, losses_units


def allocate(context: RunContext) -> ModelForm:
    """Return the final widths, measuring first what the method wants to know of each layer.

    Raises:
        PlanError: the budget cannot be met.
        CompressionError: a layer could not be measured.
    """
    prepared = context.prepared
    spec, options = prepared.spec, prepared.options
    if spec.allocate is None or not spec.measures(options):
        return prepared.plan.form
    findings = [context.ledger.record(unit).values for unit in measured(context)]
    form = spec.allocate(
        prepared.plan.shape, prepared.start, prepared.config.target, options, list(findings)
    )
    said = {"measured": spec.measures(options), "findings": _small(findings), "form": to_json(form)}
    context.run.write("allocation.json", json.dumps(said, indent=1, sort_keys=True).encode())
    return form


def measured(context: RunContext) -> list[Unit]:
    """Return the units whose records hold what was asked for, doing those that are not done."""
    units = measuring(context)
    if not units:
        return context.sums
    left = context.ledger.todo(units)
    if left:
        with context.phase("allocate", total=len(left)):
            run_units(
                context.pool, units, context.job, ledger=context.ledger, journal=context.journal
            )
    return units


def measuring(context: RunContext) -> list[Unit]:
    """Return the units that measure what the sums do not tell; nothing where they tell all."""
    spec, options = context.prepared.spec, context.prepared.options
    wanted = spec.measures(options)
    if wanted in ("", "influence"):
        return []
    if wanted == "damage":
        return damage_units(context.sums, method=spec.name, revision=spec.revision, options=options)
    if wanted == "losses":
        return losses_units(
            context.sums,
            method=spec.name,
            revision=spec.revision,
            modules=spec.shrinks(options),
            form=context.prepared.plan.form,
        )
    raise PlanError(f"{spec.name}: nobody measures {wanted!r}")


def _small(findings: list[Mapping[str, object]]) -> list[dict[str, object]]:
    names = ("influence", "curves", "losses")
    return [{name: f[name] for name in names if name in f} for f in findings]
