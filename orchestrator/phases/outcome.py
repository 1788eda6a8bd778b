"""Build the content of ``report.json`` from records and measurements."""

import json
import math
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from orchestrator.engine.failure_policy import POLICIES
from orchestrator.phases.context import RunContext
from orchestrator.phases.evaluate import Loss
from orchestrator.phases.recovery_outcome import recovery_outcome
from orchestrator.phases.refit import refit_losses
from orchestrator.phases.stored import layer_matrices, storage
from orchestrator.phases.times import promised
from orchestrator.recipe.config import recipe_values
from orchestrator.report.quality import quality
from orchestrator.report.serving import serving
from orchestrator.report.speed import compared
from orchestrator.rundir.journal import read_events
from orchestrator.rundir.layout import RESULT
from orchestrator.rundir.versions import environment
from planners.calibration import few_tokens
from planners.canonical_json import to_json
from planners.model.cost import layer_parameters
from planners.model.form import dense_form
from planners.model.modules import kept_of
from planners.units.kinds import DONE, KINDS, PHASES

SHOWN = (*POLICIES, "gave up", "notice", "waiting", "placed", "silent")


def outcome(
    context: RunContext,
    *,
    losses: Mapping[str, Loss],
    throughput: Mapping[str, Any],
    checks: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the report of a run whose phases are all done."""
    prepared, plan = context.prepared, context.prepared.plan
    events = read_events(context.run)
    begun = min(event["at"] for event in events)
    target = prepared.config.target
    seconds = _seconds(events)
    planned_bytes = max(step.plan.worker_bytes for step in (*prepared.former, prepared))
    perplexities = {name: {"perplexity": loss.perplexity} for name, loss in losses.items()}
    found = {
        "title": prepared.title,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": metadata.version("compress-cluster"),
        "verdict": "READY",
        "out": prepared.config.out,
        "model": {
            "source": prepared.config.model,
            "family": plan.shape.family,
            "revision": prepared.origin.revision,
        },
        "method": {
            "steps": _steps(context),
            "native": context.form.native,
            "served": dict(context.served),
        },
        "parameters": {
            "before": plan.parameters_before,
            "after": context.parameters_after,
            "keep_fraction": context.parameters_after / plan.parameters_before,
        },
        "target": {
            "keep_fraction": target.keep_fraction,
            "slice": target.slice,
            "speedup": target.speedup,
            "fit": target.fit,
            "keep_bytes": target.keep_bytes,
            "bits": target.bits,
            "actual_keep_fraction": context.parameters_after / plan.parameters_before,
            "nominal": target.slice,
            **({"promise": promise} if (promise := promised(context)) else {}),
        },
        "bytes": {"before": prepared.source_bytes, "after": _written_bytes(context)},
        "storage": storage(context),
        "evaluation": {
            "source": prepared.config.evaluation.source,
            "sequence_length": int(prepared.evaluation.shape[1]),
            "num_tokens": losses["compressed"].num_tokens,
            "dtype": losses["compressed"].dtype,
            **perplexities,
        },
        "throughput": {
            **throughput,
            "verdicts": [
                asdict(each) for each in compared(throughput["dense"], throughput["compressed"])
            ],
        },
        "serving": serving(json.loads(context.run.read(f"{RESULT}config.json"))),
        "statistics": {"reused_from": _reused(context), "few_tokens": _few_tokens(context)},
        "seconds": seconds,
        "memory": {
            "driver_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
            "worker_peak_bytes": context.pool.peak_bytes,
            "planned_worker_bytes": planned_bytes,
            "workers": _peaks(events),
        },
        "plan": {
            "forecast": dict(prepared.expected),
            "worker_bytes": plan.worker_bytes,
            "disk_bytes": plan.disk_bytes,
            "calibration_flops": plan.calibration_flops,
            "num_stages": max(map(len, plan.waves)),
            "num_waves": len(plan.waves),
            "num_chains": plan.chains,
        },
        "sites": [*_former(context, "sites"), *_sites(context)],
        "layers": _layers(context),
        "refit": _refit(context),
        "recovery": recovery_outcome(context),
        "timeline": _timeline(events, begun),
        "events": [
            {"at": event["at"] - begun, "what": event["kind"], "detail": event["detail"]}
            for event in events
            if event["kind"] in SHOWN
        ],
        "failures": _failures(events),
        "verify": {"passed": True, **checks},
        "recipe": to_json(recipe_values(prepared.config)),
        "recipe_defaults": _defaults(
            recipe_values(prepared.config), prepared.given.model_dump(exclude_unset=True)
        ),
        "environment": environment(),
        "resumed_units": context.ledger.num_resumed,
    }
    read = quality(found)
    return {**found, "quality": None if read is None else asdict(read)}


def _peaks(events: list[dict[str, Any]]) -> dict[str, int]:
    """Return worker -> the peak memory that it reported, to any driver of the run."""
    found: Counter[str] = Counter()
    for event in events:
        if event["worker"].startswith("worker-"):
            found[event["worker"]] = max(found[event["worker"]], event["peak_bytes"] or 0)
    return dict(found)


def _reused(context: RunContext) -> str:
    """Return the run whose statistics were reused, as the user named it; empty if none."""
    prepared = context.prepared
    return prepared.statistics_uri or prepared.config.stats or ""


def _few_tokens(context: RunContext) -> list[str]:
    prepared = context.prepared
    warnings = [
        few_tokens(
            step.plan.shape,
            step.spec.statistics(step.plan.shape, step.options),
            tokens=step.work.batching.tokens,
            sequence_length=step.work.batching.sequence_length,
            start=step.start.form,
        )
        for step in (*prepared.former, prepared)
    ]
    return list(dict.fromkeys(filter(None, warnings)))


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


def _failures(events: list[dict[str, Any]]) -> dict[str, int]:
    """Return failure class -> how often it occurred, over all drivers; only those that occurred."""
    met = Counter(event["kind"] for event in events)
    last = (event["detail"] for event in events if event["kind"] == "gave up")
    met.update(detail.partition(":")[0] for detail in last)
    return {name: met[name] for name in POLICIES if met[name]}


def _seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return seconds by phase, summed over all drivers that worked on the run."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event["kind"] == "phase ends":
            seconds[event["unit"]] += event["seconds"]
    named = {phase: seconds.get(phase, 0.0) for phase in PHASES}
    return {"total": seconds.get("run", sum(named.values())), **named}


def _written_bytes(context: RunContext) -> int:
    files = [file for unit in context.units for file in context.ledger.record(unit).files]
    return sum(file.bytes for file in files if file.path.startswith(RESULT))


def _sites(context: RunContext) -> list[dict[str, Any]]:
    sites = []
    last = context.prepared.plan.shape.num_sites - 1
    for unit in context.units:
        if KINDS[unit.kind].of == "site":
            where = "head" if unit.index == last else ("attention", "mlp")[unit.index % 2]
            values = context.ledger.record(unit).values
            sites.append({"site": unit.index, "layer": unit.index // 2, "where": where, **values})
        elif KINDS[unit.kind].of == "sites":
            values = context.ledger.record(unit).values
            sites.append({"site": 0, "layer": 0, "where": "all sites", **values})
    return sites


def _layers(context: RunContext) -> list[dict[str, Any]]:
    plan, dense = context.prepared.plan, context.prepared.origin.plan.shape
    cuts, layers = _all_cuts(context), []
    for unit in context.units:
        if KINDS[unit.kind].state != DONE:
            continue
        form = context.form.layers[unit.index]
        values = context.ledger.record(unit).values
        widths = {
            "residual": form.residual_in,
            "intermediate": form.intermediate,
            "qk head": form.qk_head_dim,
            "vo head": form.vo_head_dim,
        }
        layers.append({
            "layer": unit.index,
            "before": layer_parameters(dense, dense_form(dense, form.kind)),
            "after": layer_parameters(plan.shape, form),
            "widths": widths,
            "widths_before": {
                "residual": dense.hidden,
                "intermediate": dense.intermediate,
                "qk head": dense.head_dim,
                "vo head": dense.head_dim,
            },
            "error": values.get("error"),
            "errors": _errors(context)[unit.index],
            **({"cuts": cuts[unit.index]} if cuts else {}),
            **({"matrices": own} if (own := layer_matrices(context, unit.index, values)) else {}),
            "refit": values.get("refit"),
        })  # fmt: skip
    return layers


def step_facts(context: RunContext) -> dict[str, Any]:
    """Return what the report needs of one of several steps after its files are removed."""
    after, before = context.parameters_after, context.prepared.plan.parameters_before
    return {
        "parameters": after,
        "keep_fraction": after / before,
        "sites": _sites(context),
        "errors": _errors(context),
        **({"cuts": _cuts(context)} if context.makers else {}),
    }


def _cuts(context: RunContext) -> list[dict[str, Any]]:
    """Return for each layer the size of each module and its method, where several compete.

    Modules that were not cut are left out.
    """
    pairs = zip(context.prepared.start.form.layers, context.form.layers, strict=True)
    return [
        {
            module: {"method": method, "kept": kept_of(*pair, module)}
            for module, method in of.items()
        }
        for pair, of in zip(pairs, context.makers, strict=True)
    ]


def _all_cuts(context: RunContext) -> list[dict[str, Any]]:
    """Return the cuts of each layer over all steps; empty where no methods compete."""
    rows = [step["cuts"] for step in context.steps if "cuts" in step]
    rows += [_cuts(context)] if context.makers else []
    layers = zip(*rows, strict=True)
    return [{m: cut for own in of_layer for m, cut in own.items()} for of_layer in layers]


def _steps(context: RunContext) -> list[dict[str, Any]]:
    prepared = context.prepared
    if not context.steps:
        return [
            {
                "name": prepared.spec.name,
                "options": dict(prepared.options),
                "layer_options": to_json(prepared.config.layer_options),
                "modules": list(prepared.spec.modules),
            }
        ]
    *before, last = context.steps
    return [
        {key: value for key, value in step.items() if key not in ("sites", "errors", "cuts")}
        for step in (*before, {**last, **step_facts(context)})
    ]


def _former(context: RunContext, key: str) -> list[Any]:
    return [row for step in context.steps for row in step.get(key, ())]


def _errors(context: RunContext) -> list[dict[str, Any]]:
    """Return the relative errors of the parts of each layer, of all steps so far."""
    found: list[dict[str, Any]] = [{} for _ in context.form.layers]
    for step in context.steps:
        for errors, own in zip(found, step.get("errors", ()), strict=False):
            errors.update(own)
    for unit in context.units:
        if KINDS[unit.kind].state == DONE:
            own = context.ledger.record(unit).values.get("errors", {})
            assert isinstance(own, Mapping)  # written by our own units
            found[unit.index].update(own)
    return found


def _refit(context: RunContext) -> dict[str, Any] | None:
    """Return the held-out losses of the second pass; None without one."""
    if not context.refitting[0]:
        return None
    losses, used = refit_losses(context)
    found = {name: loss.perplexity for name, loss in losses.items()}
    perplexities = {name: each if math.isfinite(each) else None for name, each in found.items()}
    num_tokens = losses["refitted"].num_tokens
    return {"used": used, "num_tokens": num_tokens, "held_out_perplexity": perplexities}


def _timeline(events: list[dict[str, Any]], begun: float) -> list[dict[str, Any]]:
    return [
        {
            "worker": event["worker"],
            "unit": event["unit"],
            "kind": event["kind"],
            "start": event["start"] - begun,
            "end": event["start"] - begun + event["seconds"],
        }
        for event in events
        if event["worker"] and event["seconds"] and event["start"]
    ]


def _defaults(values: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of a recipe that have their default because they were not given."""
    keys = []
    for key, value in values.items():
        own = given.get(key)
        if isinstance(value, Mapping):
            keys += _defaults(value, own or {}, f"{prefix}{key}.")
        elif key not in given:
            keys.append(prefix + key)
    return keys
