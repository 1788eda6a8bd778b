"""What the report says of a recovery."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.phases.context import RunContext
from orchestrator.phases.recover import recovery_losses
from planners.recovery import SHRUNK, TRAINED, Recovery
from planners.units.kinds import KINDS


def recovery_outcome(context: RunContext) -> dict[str, Any] | None:
    """Return how the result was trained, and what that brought; None where it was not."""
    how, units = context.prepared.recovery, context.recovering
    if how is None or units is None:
        return None
    losses, used = recovery_losses(context)
    before, after = (losses[folder.rstrip("/")] for folder in (SHRUNK, TRAINED))
    found: dict[str, Any] = {
        "mode": how.mode,
        "loss": how.loss,
        "trains": how.trains,
        "data": context.prepared.config.recover.data,
        "tokens": how.tokens,
        "steps": how.steps,
        "batch": how.batch,
        "length": how.length,
        "held_out": how.held_out,
        "used": used,
        "num_tokens": before.num_tokens,
        "held_out_perplexity": {
            "before": _finite(before.perplexity),
            "after": _finite(after.perplexity),
        },
        "rates": [],
        "rate": None,
        "curve": [],
        "held_out_curve": [],
        "layers": [],
        "nothing": [],
    }
    if units.training is not None:
        values = context.ledger.record(units.training).values
        return {**found, **_curves(values, how), "seconds": _seconds(context)}
    layers = [unit for unit in units.trained if KINDS[unit.kind].of == "layer"]
    rows = [_layer(unit.index, context.ledger.record(unit).values) for unit in layers]
    return {**found, "layers": rows, "nothing": ["embedding", "final norm", "head"]}


def _seconds(context: RunContext) -> float:
    assert context.recovering is not None
    assert context.recovering.training is not None
    return context.ledger.record(context.recovering.training).seconds


def _curves(values: Mapping[str, Any], how: Recovery) -> dict[str, Any]:
    """Return the losses of the training itself, without those of trials, over its tokens."""
    trials = how.all_steps - how.steps
    per_step = how.batch * how.length
    return {
        "rates": values["trials"],
        "rate": values["rate"],
        "curve": [
            [(each["step"] - trials + 1) * per_step, each["loss"]]
            for each in values["history"]
            if each["step"] >= trials
        ],
        "held_out_curve": [
            [max(each["step"] - trials, 0) * per_step, each["loss"]] for each in values["held_out"]
        ],
    }


def _layer(index: int, values: Mapping[str, Any]) -> dict[str, Any]:
    course = values["recovery"]
    if not course:
        return {"layer": index, "before": None, "after": None, "rate": None, "kept": False}
    first: Sequence[Mapping[str, Any]] = course["held_out"]
    best = course["best"]
    return {
        "layer": index,
        "before": first[0]["loss"],
        "after": best["loss"],
        "rate": course["rate"],
        "kept": best["step"] > 0,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
