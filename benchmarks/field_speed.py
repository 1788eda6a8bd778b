"""SliceGPT, everything included, against a bare forward pass of the same tokens.

Claim: calibrating, slicing and writing a model takes at most 1.25 times as long as transformers'
own float32 forward pass of the calibration tokens through the layers, with float32 compute, and at
most 0.70 times with bfloat16 compute (the statistics stay float32 products summed in float64).
The published program takes 2.5 times (sequential) and 1.35 times (dense statistics) on this model.

    .venv/bin/python benchmarks/field_speed.py [--quick] [--rounds N]
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare import bare_forward, llama, load_bare, write_random_model
from result_file import ROOT, Goal, Result, load_average, report, table
from safetensors.torch import load_file, save_file
from trained import at_hand, stored
from turns import Timings, take_turns

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.backend.local import LocalExecutor
from orchestrator.phases.open_run import open_run
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from orchestrator.run import run_on

GOALS = {"float32": 1.25, "bfloat16": 0.70}
PERPLEXITY_GOAL = 0.005
SLICE = 0.25
PHASES = ("calibrate", "compress", "stitch")  # of what is counted, with what lies between them
TRAINED = "babyllama105"
METHOD = """\
Each turn is a process of its own. *Bare*: transformers' own decoder layers in a loop without hooks,
float32, on the same tokens, microbatches and threads, the embedding included, no head; the clock
starts when the model is loaded. *Ours*: the path of `compress-cluster run` with one worker in this
process in place of one on Ray. Counted: loading, the calibration pass with its statistics and
their files, every factorisation, the sliced layers, embedding and head, their files with checksums,
index and config, and whatever lies between. Left out: evaluating, verifying and timing the result,
which the published program does elsewhere. They take turns; the ratio is that of the medians on the
clock of the rounds that count: those in which other processes left the machine alone, if there are
enough. Beside it the same in processor time, which does not count the time that others had it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The model and the tokens."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    vocabulary: int
    num_sequences: int
    sequence_length: int
    microbatch_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What both share."""

    threads: int
    microbatch_tokens: int


FULL = Case(
    hidden=1024,
    intermediate=2816,
    num_layers=4,
    num_heads=16,
    vocabulary=32000,
    num_sequences=64,
    sequence_length=512,
    microbatch_tokens=4096,
)
QUICK = Case(
    hidden=256,
    intermediate=704,
    num_layers=2,
    num_heads=4,
    vocabulary=1000,
    num_sequences=8,
    sequence_length=128,
    microbatch_tokens=512,
)


def write_inputs(folder: Path, case: Case) -> None:
    """Write a random model and random tokens; evaluation has one short sequence."""
    config = llama(
        hidden=case.hidden,
        intermediate=case.intermediate,
        num_layers=case.num_layers,
        num_heads=case.num_heads,
        vocabulary=case.vocabulary,
    )
    write_random_model(folder / "model", config)
    random = np.random.default_rng(0)
    for name, count in (("calibration", case.num_sequences), ("evaluation", 1)):
        ids = random.integers(0, case.vocabulary, size=(count, case.sequence_length))
        save_file({"input_ids": torch.from_numpy(ids)}, folder / f"{name}.safetensors")


class Ours:
    """Runs in processes of their own; what each phase took is kept."""

    def __init__(self, folder: Path, dtype: str, options: Options) -> None:
        """Name the inputs and the compute dtype."""
        self._folder, self._dtype, self._options = folder, dtype, options
        self.found: list[Mapping[str, float]] = []

    def seconds(self) -> float:
        """Do one run in a fresh directory and return its seconds."""
        with tempfile.TemporaryDirectory(dir=self._folder) as out:
            self.found.append(_in_process("ours", self._folder, self._options, self._dtype, out))
        return self.found[-1]["clock"]


class Bare:
    """Forward passes in processes of their own."""

    def __init__(self, folder: Path, options: Options) -> None:
        """Name the inputs."""
        self._folder, self._options = folder, options
        self.found: list[Mapping[str, float]] = []

    def seconds(self) -> float:
        """Do one pass and return its seconds."""
        self.found.append(_in_process("bare", self._folder, self._options, "float32", ""))
        return self.found[-1]["clock"]


def _in_process(
    what: str, folder: Path, options: Options, dtype: str, out: str
) -> Mapping[str, float]:
    """Return what a fresh process found: it runs this file again."""
    work = {"what": what, "folder": str(folder), "dtype": dtype, "out": out, **asdict(options)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, "--work", json.dumps(work)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{what}, {dtype}\n{done.stderr[-3000:]}")
    found: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work_on(work: Mapping[str, Any]) -> dict[str, float]:
    """Do a forward pass or a run in this process; return seconds by clock and processor."""
    torch.set_num_threads(work["threads"])
    folder = Path(work["folder"])
    if work["what"] == "ours":
        return compressed(
            {
                "model": str(folder / "model"),
                "slice": SLICE,
                "out": f"{work['out']}/run",
                "calibration.source": f"tokens:{folder}/calibration.safetensors",
                "evaluation.source": f"tokens:{folder}/evaluation.safetensors",
                "calibration.microbatch_tokens": work["microbatch_tokens"],
                "calibration_dtype": work["dtype"],
                "threads": work["threads"],
            }
        )
    model = load_bare(folder / "model")
    ids = load_file(folder / "calibration.safetensors")["input_ids"]
    batches = ids.split(max(1, work["microbatch_tokens"] // ids.shape[1]))
    bare_forward(model, batches[0], grams=False)  # for warmth
    clock, processor = time.perf_counter(), time.process_time()
    for batch in batches:
        bare_forward(model, batch, grams=False)
    return {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


def compressed(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Do a run in this process up to its verification; return seconds, evaluation left out."""
    prepared = prepare(load_config(None, {"method": "slicegpt", "device": "cpu", **recipe}))
    open_run(prepared)
    begun: dict[str, tuple[float, float]] = {}
    found = {"clock": 0.0, "processor": 0.0, "perplexity": 0.0}

    def listen(event: Mapping[str, Any]) -> None:
        name, now = event["unit"], (time.perf_counter(), time.process_time())
        if event["kind"] == "phase begins":
            begun[name] = now
            if name == "verify":
                raise MeasuredError
        elif event["kind"] == "phase ends":
            spent = [end - start for start, end in zip(begun[name], now, strict=True)]
            found[name] = found.get(name, 0.0) + spent[0]
            if name == "evaluate":  # is not counted: as if it had taken no time
                begun["run"] = tuple(
                    start + s for start, s in zip(begun["run"], spent, strict=True)
                )

    with contextlib.suppress(MeasuredError):
        run_on(prepared, LocalExecutor(), listener=listen)
    begun_at, until = begun["run"], begun["verify"]
    found["clock"], found["processor"] = (b - a for a, b in zip(begun_at, until, strict=True))
    records = read_records(Directory(prepared.config.out))
    parts = [r.values for name, r in records.items() if name.startswith("evaluation-compressed")]
    total = sum(part["num_tokens"] for part in parts)
    found["perplexity"] = math.exp(sum(part["nats"] for part in parts) / total)
    return found


class MeasuredError(Exception):
    """The run has come to where it is timed to."""


def perplexities() -> dict[str, float]:
    """Return dtype of the calibration pass -> perplexity of a trained model sliced after it."""
    found = {}
    for dtype in GOALS:
        with tempfile.TemporaryDirectory() as out:
            recipe = {
                **stored(TRAINED),
                "slice": SLICE,
                "out": f"{out}/run",
                "calibration_dtype": dtype,
                "threads": torch.get_num_threads(),
            }
            found[dtype] = compressed(recipe)["perplexity"]
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="of each [%(default)s]")
    parser.add_argument(
        "--patience",
        type=int,
        default=600,
        help="seconds to wait for a quiet machine [%(default)s]",
    )
    parser.add_argument("--quick", action="store_true", help="a toy run that writes nothing")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(work_on(given.work)))
        return
    case, rounds = (QUICK, 1) if given.quick else (FULL, given.rounds)
    options = Options(threads=given.threads, microbatch_tokens=case.microbatch_tokens)
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="field-speed-") as name:
        write_inputs(Path(name), case)
        ours = {dtype: Ours(Path(name), dtype, options) for dtype in GOALS}
        subjects: Mapping[str, Ours | Bare] = {"bare": Bare(Path(name), options), **ours}
        timings = take_turns(
            {name: subject.seconds for name, subject in subjects.items()},
            rounds=rounds,
            max_rounds=rounds if given.quick else 2 * rounds,
            patience_seconds=0 if given.quick else given.patience,
        )
    _report(case, options, timings, subjects, load=load, keep=not given.quick)


def _report(
    case: Case,
    options: Options,
    timings: Timings,
    subjects: Mapping[str, Ours | Bare],
    *,
    load: str,
    keep: bool,
) -> None:
    processor = {
        name: float(np.median([found["processor"] for found in subject.found]))
        for name, subject in subjects.items()
    }
    goals, rows = [], []
    for name in subjects:
        ratio = timings.median(name) / timings.median("bare")
        cpu_ratio = processor[name] / processor["bare"]
        each = " ".join(f"{r[name].seconds:.2f}" for r in timings.quiet)
        rows.append(
            (
                name,
                f"{timings.median(name):.2f}",
                each,
                f"{ratio:.3f}",
                f"{processor[name]:.2f}",
                f"{cpu_ratio:.3f}",
            )
        )
        if name in GOALS:
            goals.append(
                Goal(
                    text=f"everything in at most {GOALS[name]} of the bare float32 forward, "
                    f"{name} compute",
                    measured=f"{ratio:.3f} on the clock, {cpu_ratio:.3f} in processor time",
                    met=max(ratio, cpu_ratio) <= GOALS[name],
                )
            )
    if keep and at_hand(TRAINED):
        found = perplexities()
        effect = found["bfloat16"] / found["float32"] - 1
        measured = f"{effect:+.3%} ({found['float32']:.4f} -> {found['bfloat16']:.4f})"
        text = f"bfloat16 changes perplexity by at most {PERPLEXITY_GOAL:.1%}, {TRAINED}"
        goals.append(Goal(text=text, measured=measured, met=abs(effect) <= PERPLEXITY_GOAL))
    phases = [
        (name, *(f"{float(np.median([f[phase] for f in subject.found])):.2f}" for phase in PHASES))
        for name, subject in subjects.items()
        if name in GOALS
    ]
    columns = ("", "clock, median", "by round", "of bare", "processor, median", "of bare")
    report(
        Result(
            claim="field_speed",
            method=METHOD,
            configuration={
                "model": f"Llama, hidden {case.hidden}, {case.num_layers} layers, intermediate "
                f"{case.intermediate}, {case.num_heads} heads, vocabulary {case.vocabulary}, "
                "float32, random weights",
                "tokens": f"{case.num_sequences} x {case.sequence_length}, random",
                "microbatch": f"{case.microbatch_tokens} tokens, of ours and of the bare pass",
                "slice": SLICE,
                "workers": 1,
                "threads": options.threads,
                "rounds": len(timings.rounds),
            },
            tables={
                "Seconds:": table(columns, rows),
                "Phases of ours on the clock, medians of all rounds:": table(("", *PHASES), phases),
            },
            goals=goals,
            notes=[timings.say()],
            load=load,
        ),
        keep=keep,
    )


if __name__ == "__main__":
    main()
