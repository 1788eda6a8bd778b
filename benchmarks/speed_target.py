"""A speed that was asked for is reached, and it costs no more perplexity than a fraction would.

Claim: on a random Llama of 60 million parameters on a CPU, the speed-up that a run promises from
the times of single layers is within 15 % of what it then measures of whole models, in prefill and
in decoding; and on a trained toy, at equal predicted time, the perplexity of ``--speedup`` is not
above that of ``--keep-fraction``.

Method: whole runs in this process. The promise is the plan's: the times of MLP and attention at
each width, measured at the start of the run. The measurement is the run's own throughput phase:
both models in turn at the batch and context of the promise, the median of the ratios of the rounds.
For the toy, the widths by ``keep_fraction`` are those of the largest fraction whose predicted time,
by the same times of layers, is not above that of the run by speed.

    .venv/bin/python benchmarks/speed_target.py [--quick]
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from result_file import Goal, Result, load_average, report, table
from trained import at_hand, nobody, stored, with_code_apart

from actors.storage.files import Directory
from actors.storage.sample_model import write_sample
from orchestrator.backend.local import LocalExecutor
from orchestrator.phases.open_run import open_run
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from orchestrator.run import run_on
from planners.budget.budgets import budget_of
from planners.method import Target
from planners.model.serving_load import times_from

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8,
    "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64, "vocab_size": 4096, "dtype": "float32",
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": None, "rms_norm_eps": 1e-5,
}  # fmt: skip
LOADS = (("prefill", 4, 256, 1.3), ("prefill", 1, 512, 1.5), ("decode", 4, 256, 1.2))
TOY, TOY_LOAD, TOY_SPEEDUPS = "babyllama105", ("prefill", 4, 256), (1.1, 1.2)
MOST_OFF = 0.15
BISECTIONS = 12


def measured(keys: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return the report of a run."""
    prepared = prepare(load_config(None, {**keys, "out": str(out)}))
    open_run(prepared)
    return run_on(prepared, LocalExecutor(), listener=nobody)


def of_load(phase: str, batch: int, context: int) -> dict[str, Any]:
    """Return the recipe's keys of a load."""
    return {"serving.phase": phase, "serving.batch": batch, "serving.context": context}


def ratio(found: Mapping[str, Any], phase: str) -> tuple[float, float, float]:
    """Return the measured ratio of a phase, and the interval of its median."""
    (each,) = (v for v in found["throughput"]["verdicts"] if v["part"] == phase)
    return each["ratio"], each["low"], each["high"]


def promises(work: Path, *, quick: bool) -> list[list[Any]]:
    """Return load, asked, promised, measured and the interval of each run."""
    model = work / "model"
    sequences = {"calibration": (16, 256), "evaluation": (4, 256)}
    write_sample(Directory(str(model)), CONFIG, sequences=sequences)
    keys = {
        "model": str(model),
        "calibration.source": f"tokens:{model}/calibration.safetensors",
        "evaluation.source": f"tokens:{model}/evaluation.safetensors",
        "device": "cpu",
    }
    rows = []
    base = ""
    for phase, batch, context, asked in LOADS[: 1 if quick else None]:
        run = work / f"{phase}-{batch}-{context}"
        known = {"stats": base} if base else {"keep_statistics": True}
        given = {**keys, **known, **of_load(phase, batch, context), "speedup": asked}
        found = measured(given, run)
        base = base or str(run)
        promised = found["target"]["promise"]["promised"]
        rows.append([f"{phase}, {batch} x {context}", asked, promised, *ratio(found, phase)])
        print(rows[-1], flush=True)
    return rows


def at_equal_time(work: Path, *, quick: bool) -> list[list[Any]]:
    """Return the speed-up asked for, the two perplexities, the fractions kept, and the times."""
    keys = stored(TOY, sequences=8 if quick else None)
    rows = []
    base = ""
    for asked in TOY_SPEEDUPS:
        run = work / f"speed-{asked}"
        known = {"stats": base} if base else {"keep_statistics": True}
        load = of_load(*TOY_LOAD)
        by_speed = measured({**keys, **known, **load, "speedup": asked}, run)
        base = base or str(run)
        fraction, seconds = _fraction_of(run, {**keys, "stats": base, **load, "speedup": asked})
        given = {**keys, "stats": base, "keep_fraction": fraction, "options.servable": "remote"}
        by_size = measured(given, work / f"size-{asked}")
        rows.append(
            [asked]
            + [float(r["evaluation"]["compressed"]["perplexity"]) for r in (by_speed, by_size)]
            + [float(r["parameters"]["keep_fraction"]) for r in (by_speed, by_size)]
            + list(seconds)
        )
        print(rows[-1], flush=True)
    return rows


def _fraction_of(run: Path, keys: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
    """Return the largest fraction that is predicted to be as fast, and both predicted times."""
    prepared = prepare(load_config(None, {**keys, "out": str(run)}))
    allocation = json.loads((run / "allocation.json").read_text())
    record = json.loads((run / "records" / "times.json").read_text())
    times = times_from(record["values"]["times"])
    shape, start = prepared.plan.shape, prepared.start
    options = {**prepared.options, "servable": "remote"}
    target = replace(prepared.target, times=times)
    budget = budget_of(shape, start, target)
    assert prepared.spec.allocate is not None

    def cost(wanted: Target, how: Mapping[str, Any]) -> float:
        form = prepared.spec.allocate(shape, start, wanted, how, allocation["findings"]).form
        return budget.cost(form)

    goal = cost(target, prepared.options)
    low, high = 0.3, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if cost(Target(keep_fraction=middle), options) <= goal:
            low = middle
        else:
            high = middle
    return low, (goal, cost(Target(keep_fraction=low), options))


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one load, few sequences; no file")
    quick = parser.parse_args().quick
    load = load_average()
    with tempfile.TemporaryDirectory() as folder:
        kept = promises(Path(folder), quick=quick)
        equal = at_equal_time(Path(folder), quick=quick) if at_hand(TOY) else []
    goals = [
        Goal(
            text=f"{row[0]}: promised and measured differ by at most {MOST_OFF:.0%}",
            measured=f"{row[2]:.3f} and {row[3]:.3f}",
            met=abs(row[3] / row[2] - 1) <= MOST_OFF,
        )
        for row in kept
    ] + [
        Goal(
            text=f"toy, speed-up {row[0]}: no more perplexity than by size at equal predicted time",
            measured=f"{row[1]:.3f} and {row[2]:.3f}",
            met=row[1] <= row[2] * 1.001,
        )
        for row in equal
    ]
    promised = table(
        ("load", "asked", "promised", "measured", "95 % of the median"),
        [(r[0], r[1], f"{r[2]:.3f}", f"{r[3]:.3f}", f"{r[4]:.3f} to {r[5]:.3f}") for r in kept],
    )
    toy = table(
        ("asked", "perplexity by speed", "by size", "kept by speed", "by size",
         "predicted ms by speed", "by size"),
        [(r[0], *(f"{x:.4f}" for x in r[1:5]), *(f"{1e3 * x:.3f}" for x in r[5:])) for r in equal],
    )  # fmt: skip
    tables = {"A random Llama of 63 million parameters:": promised}
    if equal:
        tables[f"{TOY}, prefill of 4 x 256:"] = toy
    report(
        Result(
            claim="speed_target",
            method=__doc__.split("Method: ")[1].partition("\n\n")[0],
            configuration={"model": json.dumps(CONFIG), "threads": 1, "toy": TOY},
            tables=tables,
            goals=goals,
            load=load,
        ),
        keep=not quick,
    )


if __name__ == "__main__":
    with_code_apart(main)
