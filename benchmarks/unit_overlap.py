"""Reading, computing and writing of units: this tree against another one, on the processor.

Claim: a worker that reads the next layer and writes the last one while it computes takes no longer
for the sums and the units of layers of 7B proportions; how much less depends on how long the disk
and the hashes take beside the products, which are slow here and are milliseconds on a GPU.

    .venv/bin/python benchmarks/unit_overlap.py OTHER_TREE [--quick] [--rounds N]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from result_file import ROOT, Goal, Result, load_average, report, table
from shaped import config_of, write_checkpoint, write_tokens
from turns import take_turns

METHODS: Mapping[str, Mapping[str, Any]] = {
    "modegpt": {"keep_fraction": 0.75, "options": {"allocation": "uniform"}},
    "slicegpt": {"slice": 0.25},
}
PHASES = ("calibrate", "compress")
PROCESSOR = "all, processor time"
VOCABULARY = 4096
GOAL = 1.0
METHOD = """\
Each turn is a process of its own that imports one of the two trees and does a run up to its
verification, with one worker in that process: same files, tokens and threads. The trees take turns.
Seconds are medians over the rounds; a ratio is the median of the ratios of the rounds. Writes are
flushed to this machine's disk."""


class MeasuredError(Exception):
    """The run has come to where it is timed to."""


def work_on(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Do a run here, of the tree that is on the path; return phase -> seconds."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    prepared = prepare(load_config(None, recipe))
    open_run(prepared)
    begun: dict[str, float] = {}
    found: dict[str, float] = {}

    def listen(event: Mapping[str, Any]) -> None:
        name, now = event["unit"], time.perf_counter()
        if event["kind"] == "phase begins":
            begun[name] = now
            if name == "verify":
                raise MeasuredError
        elif event["kind"] == "phase ends":
            found[name] = found.get(name, 0.0) + now - begun[name]

    processor = time.process_time()
    with contextlib.suppress(MeasuredError):
        run_on(prepared, LocalExecutor(), listener=listen)
    found[PROCESSOR] = time.process_time() - processor
    return found


class Tree:
    """Runs of one tree in processes of their own; what each phase took is kept."""

    def __init__(self, root: Path, folder: Path, method: str) -> None:
        """Name the tree, the folder of the inputs, and the method."""
        self._root, self._folder, self._method = root, folder, method
        self.found: list[dict[str, float]] = []

    def seconds(self) -> float:
        """Do one run in a fresh directory and return the seconds of the phases that count."""
        with tempfile.TemporaryDirectory(dir=self._folder) as out:
            recipe = {
                "model": str(self._folder / "model"),
                "out": f"{out}/run",
                "device": "cpu",
                "method": self._method,
                "calibration": {"source": f"tokens:{self._folder}/calibration.safetensors"},
                "evaluation": {"source": f"tokens:{self._folder}/evaluation.safetensors"},
                **METHODS[self._method],
            }
            done = subprocess.run(
                [sys.executable, __file__, "", "--work", json.dumps(recipe)],
                env={**os.environ, "PYTHONPATH": str(self._root)},
                cwd=self._root,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"{self._root}, {self._method}\n{done.stderr[-3000:]}")
        self.found.append(json.loads(done.stdout.splitlines()[-1]))
        return sum(self.found[-1][phase] for phase in PHASES)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", help="a checkout of this project to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a toy run that writes nothing")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(work_on(given.work)))
        return
    rounds, shrink, layers = (1, 16, 2) if given.quick else (given.rounds, 2, 2)
    load = load_average()
    rows, said, compressing = [], [], {}
    with tempfile.TemporaryDirectory(prefix="unit-overlap-") as name:
        folder = Path(name)
        config = config_of("llama-2-7b", num_layers=layers, shrink=shrink, vocabulary=VOCABULARY)
        write_checkpoint(folder / "model", config)
        for tokens, count in (("calibration", 4), ("evaluation", 1)):
            path = folder / f"{tokens}.safetensors"
            write_tokens(path, num_sequences=count, sequence_length=128, vocabulary=VOCABULARY)
        for method in METHODS:
            trees = {
                "other": Tree(Path(given.other).resolve(), folder, method),
                "this": Tree(ROOT, folder, method),
            }
            timings = take_turns(
                {tree: each.seconds for tree, each in trees.items()},
                rounds=rounds,
                max_rounds=rounds,
                patience_seconds=0,
            )
            said.append(f"{method}: {timings.say()}")
            for phase in (*PHASES, PROCESSOR):
                before, after = ([f[phase] for f in tree.found] for tree in trees.values())
                ratios = [b / a for a, b in zip(before, after, strict=True)]
                if phase == "compress":
                    compressing[method] = median(ratios)
                rows.append(
                    (
                        method,
                        phase,
                        f"{median(before):.2f}",
                        f"{median(after):.2f}",
                        f"{median(ratios):.2f}",
                        " ".join(f"{ratio:.2f}" for ratio in ratios),
                    )
                )
    report(
        Result(
            claim="unit_overlap",
            method=METHOD,
            configuration={
                "model": f"Llama, hidden {config['hidden_size']}, intermediate "
                f"{config['intermediate_size']}, {layers} layers, bfloat16, random weights",
                "tokens": "4 x 128, random: what is timed is reading, factoring and writing",
                "the other tree": _commit(given.other),
                "rounds": rounds,
            },
            tables={
                "Seconds:": table(("method", "phase", "other", "this", "ratio", "by round"), rows)
            },
            goals=[
                Goal(
                    text=f"{method}, compress: at most {GOAL} of the other tree's seconds",
                    measured=f"{ratio:.2f}",
                    met=ratio <= GOAL,
                )
                for method, ratio in compressing.items()
            ],
            notes=said,
            load=load,
        ),
        keep=not given.quick,
    )


def _commit(tree: str) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
