"""Six points of a sweep cost less than two runs: calibration is done once.

Claim: a sweep of three methods at two sizes takes less than twice the time of one run, calibration
included, on a model where calibration takes at least four times as long as compressing and
evaluating one point.

    .venv/bin/python benchmarks/sweep_cost.py [--quick]
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare import VOCABULARY, llama, write_random_model
from result_file import Goal, Result, load_average, report, table
from safetensors.torch import save_file
from trained import with_code_apart

GOAL = 2.0
DOMINATES = 4.0  # calibration over compress + evaluate of one point
METHODS = ("slicegpt", "modegpt", "svdllm")
FRACTIONS = (0.9, 0.8)
OPTIONS = {"allocation": "uniform"}
THREADS = 1
METHOD = """\
In one process, one thread, float32, a Llama with random weights and random tokens. *Run*: SliceGPT
at 0.8 from nothing to its measured perplexity (calibrate, compress, stitch, evaluate; verification
and the timing of throughput, which a run does besides and a point of a sweep does not, are left
out, which makes the comparison harder). *Sweep*: a fresh directory, one calibration with the union
of the statistics of all methods, then every method at every size, each compressed, stitched and
evaluated from its files, the front and its page written. The ratio is of processor time, one thread
in one process: unlike the clock, which is beside it, it does not count what other processes took
meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes of the model and of its data."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    calibration: int
    evaluation: int
    sequence_length: int


CASE = Case(
    hidden=256,
    intermediate=704,
    num_layers=4,
    num_heads=4,
    calibration=128,
    evaluation=4,
    sequence_length=512,
)
QUICK = Case(
    hidden=64,
    intermediate=176,
    num_layers=2,
    num_heads=2,
    calibration=16,
    evaluation=2,
    sequence_length=64,
)


class MeasuredError(Exception):
    """The run has come to where it is timed to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Seconds on the clock and of the processor, and seconds of each phase."""

    clock: float
    processor: float
    phases: Mapping[str, float]


def write_inputs(folder: Path, case: Case) -> dict[str, Any]:
    """Write a model and tokens for it; return the recipe."""
    config = llama(
        hidden=case.hidden,
        intermediate=case.intermediate,
        num_layers=case.num_layers,
        num_heads=case.num_heads,
    )
    write_random_model(folder / "model", config)
    random = np.random.default_rng(1)
    for name, count in (("calibration", case.calibration), ("evaluation", case.evaluation)):
        ids = random.integers(0, VOCABULARY, size=(count, case.sequence_length))
        save_file({"input_ids": torch.from_numpy(ids)}, folder / f"{name}.safetensors")
    return {
        "model": str(folder / "model"),
        "method": "slicegpt",
        "keep_fraction": 0.8,
        "options.round_to": 1,
        "calibration.source": f"tokens:{folder}/calibration.safetensors",
        "evaluation.source": f"tokens:{folder}/evaluation.safetensors",
        "device": "cpu",
        "threads": THREADS,
    }


def timed(work: Any, listened: list[Mapping[str, Any]]) -> Timed:
    """Return how long a piece of work takes."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    seconds = (time.perf_counter() - clock, time.process_time() - processor)
    phases: dict[str, float] = {}
    for event in listened:
        if event["kind"] == "phase ends":
            phases[event["unit"]] = phases.get(event["unit"], 0.0) + event["seconds"]
    return Timed(clock=seconds[0], processor=seconds[1], phases=phases)


def one_run(recipe: Mapping[str, Any], out: Path) -> Timed:
    """Do one run up to its verification."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    events: list[Mapping[str, Any]] = []

    def listen(event: Mapping[str, Any]) -> None:
        events.append(event)
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            raise MeasuredError

    def work() -> None:
        prepared = prepare(load_config(None, {**recipe, "out": str(out)}))
        open_run(prepared)
        try:
            run_on(prepared, LocalExecutor(), listener=listen)
        except MeasuredError:
            return
        raise AssertionError("the run has no verification")

    return timed(work, events)


def one_sweep(recipe: Mapping[str, Any], out: Path) -> tuple[Timed, list[dict[str, Any]]]:
    """Do a sweep from nothing; return its points too."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.experiments.sweep import points_of, sweep_on
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config

    events: list[Mapping[str, Any]] = []
    found: dict[str, Any] = {}

    def work() -> None:
        base = prepare(load_config(None, {**recipe, "out": str(out)}))
        points = points_of(base, METHODS, FRACTIONS, OPTIONS)
        found.update(sweep_on(base, points, LocalExecutor(), listener=events.append))

    seconds = timed(work, events)
    return seconds, found["points"]


def main() -> None:
    """Time a run and a sweep, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes nothing")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    case = QUICK if given.quick else CASE
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="sweep-cost-") as name:
        folder = Path(name)
        recipe = write_inputs(folder, case)
        one_run(write_warm(folder), folder / "warm")  # imports and first calls are nobody's cost
        single = one_run(recipe, folder / "run")
        sweep, points = one_sweep(recipe, folder / "sweep")
    calibrate = sweep.phases["calibrate"]
    dearest = max(point["seconds"] for point in points)
    report(
        Result(
            claim="sweep_cost",
            method=METHOD,
            configuration={
                "model": f"hidden {case.hidden}, intermediate {case.intermediate}, "
                f"{case.num_layers} layers, {case.num_heads} heads, vocabulary {VOCABULARY}",
                "calibration": f"{case.calibration} sequences of {case.sequence_length} tokens",
                "evaluation": f"{case.evaluation} sequences of {case.sequence_length} tokens",
                "points": f"{', '.join(METHODS)} at {', '.join(map(str, FRACTIONS))}",
                "threads": THREADS,
                "executor": "LocalExecutor",
            },
            tables={
                "Seconds:": table(
                    ("", "clock", "processor"),
                    [
                        ("one run", f"{single.clock:.2f}", f"{single.processor:.2f}"),
                        ("sweep of six", f"{sweep.clock:.2f}", f"{sweep.processor:.2f}"),
                        ("its calibration", f"{calibrate:.2f}", ""),
                    ],
                ),
                "Points, seconds of compression, stitching and evaluation on the clock:": table(
                    ("point", "kept", "seconds"),
                    [
                        (p["name"], f"{p['keep_fraction']:.4f}", f"{p['seconds']:.2f}")
                        for p in points
                    ],
                ),
            },
            goals=[
                Goal(
                    text=f"six points take less than {GOAL} times the processor time of one run",
                    measured=f"{sweep.processor / single.processor:.2f} times "
                    f"({sweep.clock / single.clock:.2f} on the clock)",
                    met=sweep.processor / single.processor < GOAL,
                ),
                Goal(
                    text=f"the run's calibration takes at least {DOMINATES} times as long as any "
                    "point's compression and evaluation",
                    measured=f"{single.phases['calibrate'] / dearest:.1f} times",
                    met=single.phases["calibrate"] / dearest >= DOMINATES,
                ),
            ],
            load=load,
        ),
        keep=not given.quick,
    )


def write_warm(folder: Path) -> dict[str, Any]:
    """Write a tiny model and return its recipe."""
    (folder / "tiny").mkdir()
    return write_inputs(folder / "tiny", QUICK)


if __name__ == "__main__":
    with_code_apart(main)
