"""Layers of Llama-2-70B's shapes go through every method on a machine of 24 GiB, within the plan.

Claim: two layers of the exact shapes (hidden 8192, FFN 28672, 64 heads, 8 KV heads), random
bfloat16 weights, go through calibration and compression with each method, one layer resident at a
time, in the memory that the plan states: the FFN's 6.6 GB gram is packed, mapped, and factored in
place. The plan's bytes are within 10 % of the peak, and the seconds of its phases, from a sample
timed before (`plan --measure`), within 25 % of the measured. The same script with ``--shrink`` does
the same at a fraction of the widths. What a method took is kept in a ``--folder``, if one is given.

    .venv/bin/python benchmarks/large_layers.py [--shrink N] [--methods a,b] [--folder DIR]
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from plan_truth import BYTES_GOAL, LONG, PHASES, SECONDS_GOAL
from result_file import Goal, Result, load_average, report, table
from shaped import (
    VOCABULARY,
    config_of,
    gib,
    layer_by_layer,
    run_apart,
    run_here,
    write_checkpoint,
    write_tokens,
)

from orchestrator.forecast.forecast import forecast_of
from orchestrator.forecast.pricing import Pricing
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from planners.errors import PlanError

MODEL = "llama-2-70b"
LAYERS = 2
SEQUENCES, LENGTH = 4, 128  # few hundred tokens
METHODS: Mapping[str, Mapping[str, Any]] = {
    "modegpt": {"keep_fraction": 0.75, "options.allocation": "uniform"},
    "svdllm": {"keep_fraction": 0.75},
    "slicegpt": {"slice": 0.25},
}
METHOD = """\
Each method has a process of its own with one worker in it: the path of `compress-cluster run` up to
verification, in bfloat16, on a local directory. Memory is anonymous memory above what the imports
took, sampled every 20 ms; mapped files do not count. Driver and worker are one process here. Memory
is bounded to the least that the plan accepts, and each layer is to be a wave of its own, though two
may fit in what a factorisation takes afterwards. The planned seconds are those of `plan
--measure`, which times a sample for a few minutes before, of smaller widths where a whole layer
takes longer; losses are measured in float32 before and after."""


def measured(method: str, folder: Path, *, threads: int, statistics_dtype: str) -> dict[str, Any]:
    """Return what a run of one method found."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        recipe = {
            "model": str(folder / "model"),
            "method": method,
            **METHODS[method],
            "out": f"{out}/run",
            "calibration.source": f"tokens:{folder}/tokens.safetensors",
            "evaluation.source": f"tokens:{folder}/evaluation.safetensors",
            "calibration.microbatch_tokens": SEQUENCES * LENGTH // 2,
            "calibration_dtype": "bfloat16",
            "statistics_dtype": statistics_dtype,
            "device": "cpu",
            "threads": threads,
        }
        recipe["worker_gib"] = least_gib(recipe)
        expected = forecast_of(layer_by_layer(recipe), Pricing(measure=True)).to_json()
        found = run_apart(Path(__file__), recipe)
        found["forecast"] = expected
    print(f"{method}: {found['peak_bytes']:,} bytes of {found['planned_bytes']:,} planned")
    return found


def _kept(method: str, folder: Path, *, given: argparse.Namespace) -> dict[str, Any]:
    """Return what was found of a method in this folder, now or before: each takes long."""
    path = folder / f"{method}.json"
    if not path.exists():
        found = measured(
            method, folder, threads=given.threads, statistics_dtype=given.statistics_dtype
        )
        path.write_text(json.dumps(found))
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def least_gib(recipe: Mapping[str, Any]) -> float:
    """Return the least memory that a worker can be planned with, to a thousandth."""
    low, high = 0.0, 1000.0
    while high - low > high / 1000:
        middle = (low + high) / 2
        try:
            prepare(load_config(None, {**recipe, "worker_gib": middle}))
        except PlanError:
            low = middle
        else:
            high = middle
    return high


def main() -> None:
    """Measure every method and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shrink", type=int, default=1, help="divides all widths [%(default)s]")
    parser.add_argument("--methods", default=",".join(METHODS), help="[%(default)s]")
    parser.add_argument("--folder", type=Path, help="scratch, where a checkpoint may lie already")
    parser.add_argument("--threads", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--statistics-dtype", default="float64", help="[%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a toy run that writes nothing")
    parser.add_argument("--recipe", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.recipe:
        torch.set_num_threads(given.recipe["threads"])
        print(json.dumps(run_here(given.recipe)))
        return
    shrink = 16 if given.quick else given.shrink
    config = config_of(MODEL, num_layers=LAYERS, shrink=shrink, vocabulary=VOCABULARY)
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="large-layers-") as scratch:
        folder = given.folder or Path(scratch)
        write_checkpoint(folder / "model", config)
        for name, count in (("tokens", SEQUENCES), ("evaluation", 1)):
            write_tokens(
                folder / f"{name}.safetensors",
                num_sequences=count,
                sequence_length=LENGTH,
                vocabulary=VOCABULARY,
            )
        found = {method: _kept(method, folder, given=given) for method in given.methods.split(",")}
    _report(config, found, given, load=load)


def _report(
    config: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    given: argparse.Namespace,
    *,
    load: str,
) -> None:
    rows = [
        (
            method,
            one["num_waves"],
            gib(one["peak_bytes"]),
            gib(one["planned_bytes"]),
            f"{one['peak_bytes'] / one['planned_bytes']:.2f}",
            f"{one['seconds']['calibrate']:.0f}",
            f"{one['seconds']['compress']:.0f}",
            ", ".join(sorted({r for each in one["rungs"].values() for r in each.values()})) or "-",
        )
        for method, one in found.items()
    ]
    timed = [row for method, one in found.items() for row in _timed(method, one)]
    goals = [goal for method, one in found.items() for goal in _goals(method, one)]
    columns = (
        "method",
        "waves",
        "peak, GiB",
        "plan, GiB",
        "peak / plan",
        "calibrate, s",
        "compress, s",
        "rungs",
    )
    units = [
        (method, name, f"{seconds:.0f}")
        for method, one in found.items()
        for name, seconds in sorted(one["units"].items())
    ]
    some = "" if set(found) == set(METHODS) else f"_{'_'.join(found)}"
    shrunk = "" if given.shrink == 1 else f"_shrink{given.shrink}"
    report(
        Result(
            claim=f"large_layers{some}{shrunk}",
            method=METHOD,
            configuration={
                "model": f"{LAYERS} layers of {MODEL}, widths over {given.shrink}: {dict(config)}",
                "tokens": f"{SEQUENCES} x {LENGTH}, random",
                "statistics_dtype": given.statistics_dtype,
                "threads": given.threads,
                **{name: dict(how) for name, how in METHODS.items()},
            },
            tables={
                "By method:": table(columns, rows),
                f"Seconds of phases of {LONG:g} s and more:": table(
                    ("method", "phase", "planned p50", "measured", "off"), timed
                ),
                "Seconds of each unit:": table(("method", "unit", "seconds"), units),
            },
            goals=goals,
            notes=[f"{method}: {note}" for method, one in found.items() for note in _said(one)],
            load=load,
        ),
        keep=not given.quick,
    )


def _said(one: Mapping[str, Any]) -> list[str]:
    return [one["forecast"]["source"], *one["forecast"]["notes"]]


def _errors(one: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return phase -> planned and measured seconds, of those long enough to say something."""
    phases, actual = one["forecast"]["phases"], one["seconds"]
    long = [name for name in PHASES if name in phases and actual.get(name, 0.0) >= LONG]
    return {name: (phases[name]["p50"], actual[name]) for name in long}


def _timed(method: str, one: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (method, phase, f"{planned:.0f}", f"{actual:.0f}", f"{actual / planned - 1:+.0%}")
        for phase, (planned, actual) in _errors(one).items()
    ]


def _goals(method: str, one: Mapping[str, Any]) -> list[Goal]:
    peak, planned = one["peak_bytes"], one["planned_bytes"]
    times = _errors(one)
    total = sum(b for _, b in times.values()) / max(sum(a for a, _ in times.values()), 1e-9) - 1
    worst = max((abs(b / a - 1) for a, b in times.values()), default=0.0)
    return [
        Goal(
            text=f"{method}: one layer resident at a time, peak within the plan and within "
            f"{BYTES_GOAL:.0%} of it",
            measured=f"{one['num_waves']} waves, {gib(peak)} of {gib(planned)} GiB",
            met=one["num_waves"] == LAYERS and 1 - BYTES_GOAL <= peak / planned <= 1,
        ),
        Goal(
            text=f"{method}: planned seconds of these phases together within {SECONDS_GOAL:.0%}",
            measured=f"{total:+.0%}; a phase by itself at most {worst:.0%} off",
            met=abs(total) <= SECONDS_GOAL,
        ),
    ]


if __name__ == "__main__":
    main()
