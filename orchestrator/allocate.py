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
    prepared = context.prepared
    wanted = prepared.spec.measures(prepared.options)
    if wanted in ("", "influence"):
        return context.sums
    spec, options = prepared.spec, prepared.options
    if wanted == "damage":
        units = damage_units(
            context.sums, method=spec.name, revision=spec.revision, options=options
        )
    elif wanted == "losses":
        units = losses_units(
            context.sums,
            method=spec.name,
            revision=spec.revision,
            modules=spec.shrinks(options),
            form=prepared.plan.form,
        )
    else:
        raise PlanError(f"{prepared.spec.name}: nobody measures {wanted!r}")
    left = context.ledger.todo(units)
    if left:
        with context.phase("allocate", total=len(left)):
            run_units(
                context.pool, units, context.job, ledger=context.ledger, journal=context.journal
            )
    return units


def _small(findings: list[Mapping[str, object]]) -> list[dict[str, object]]:
    names = ("influence", "curves", "losses")
    return [{name: f[name] for name in names if name in f} for f in findings]
