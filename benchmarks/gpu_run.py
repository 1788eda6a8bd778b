"""Two trees of this project on one GPU: whole runs by phase, and how fast their results are.

Claims: with 7B shapes (8 layers, random bfloat16 weights, 64 x 2,048 calibration tokens) a run
takes at most half the wall time of the other tree's; a result of MoDeGPT at 0.75 prefills
(4 x 2,048) at least 1.15 times and decodes with CUDA graphs (batch 16, context 2,048) at least 1.10
times as fast as the dense model; one of SliceGPT with --slice 0.25 is not slower than it; a layer
of 70B shapes with its grams reaches 0.85 of the bare products.

    .venv/bin/python benchmarks/gpu_run.py BEFORE AFTER [--minutes 8] [--device cpu --tiny]

BEFORE and AFTER are checkouts; both run in this environment. What fails, or has no time left, is
listed as not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_layer import layer_rates
from result_file import Goal, Result, load_average, report, table
from shaped import config_of, write_checkpoint, write_tokens

from actors.storage.checkpoint import Checkpoint
from planners.families import family_of
from planners.model.cost import forward_flops, model_parameters
from planners.timing import EAGER

METHODS: Mapping[str, Sequence[str]] = {
    "modegpt": ("--method", "modegpt", "--keep-fraction", "0.75"),
    "slicegpt": ("--method", "slicegpt", "--slice", "0.25"),
}
PHASES = ("calibrate", "allocate", "compress", "evaluate", "verify", "throughput")
WALL_GOAL, LAYER_GOAL = 0.5, 0.85
SPEED_GOALS = {  # method -> prefill and decode of the result, relative to the dense model
    "modegpt": {"prefill": 1.15, "decode": 1.10},
    "slicegpt": {"prefill": 1.0, "decode": 1.0},
}
METHOD = """\
Each run is `compress-cluster run` of one tree from an empty directory, workers on a Ray of its own,
everything included. The tree AFTER goes first, so that the other one finds the files of the model
in memory and the card warm. Speeds are those of `compress-cluster bench` of the tree AFTER, which
times dense model and results in turn: prefill from a batch of prompts, decode as tokens per second
after prompts of that length, eager and as CUDA graphs. The ideal ratios are those of the operations
of the layers (prefill) and of the weights, keys and values that are read for a token (decode),
dense over result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run: shapes and tokens."""

    num_layers: int
    shrink: int
    vocabulary: int
    sequences: int
    length: int
    prompt: int
    prefill: int  # prompts
    decode: int  # likewise
    layer_tokens: int


FULL = Case(
    num_layers=8,
    shrink=1,
    vocabulary=32000,
    sequences=64,
    length=2048,
    prompt=2048,
    prefill=4,
    decode=16,
    layer_tokens=8192,
)
TINY = Case(
    num_layers=2,
    shrink=16,
    vocabulary=512,
    sequences=8,
    length=64,
    prompt=64,
    prefill=2,
    decode=4,
    layer_tokens=2048,
)


class NotMeasuredError(Exception):
    """A command failed, or there is no time left for it."""


class Session:
    """The commands of one measurement, within its time."""

    def __init__(self, folder: Path, device: str, *, minutes: float) -> None:
        """Name the folder of all files and the device."""
        self._folder, self._device = folder, device
        self._until = time.monotonic() + 60 * minutes
        self.skipped: list[str] = []

    def run(self, tree: Path, method: str, name: str) -> dict[str, float]:
        """Do a run of one tree; return its wall seconds and those of each phase."""
        out = self._folder / name
        begun = time.monotonic()
        self._command(
            tree,
            [
                *("run", str(self._folder / "model"), "--out", str(out), *METHODS[method]),
                *("--calibration", f"tokens:{self._folder}/calibration.safetensors"),
                *("--evaluation", f"tokens:{self._folder}/evaluation.safetensors"),
            ],
        )
        wall = time.monotonic() - begun
        phases = json.loads((out / "report.json").read_text())["seconds"]
        return {"wall": wall, **{k: v for k, v in phases.items() if isinstance(v, float | int)}}

    def bench(self, tree: Path, models: Sequence[str], case: Case) -> dict[str, Any]:
        """Return what ``bench --json`` of a tree says of models."""
        text = self._command(
            tree,
            [
                "bench",
                *(str(self._folder / model) for model in models),
                *("--json", "--prompt", str(case.prompt), "--new-tokens", "32"),
                *("--batch", str(case.prefill), "--batch", str(case.decode)),
            ],
        )
        (self._folder / "bench.json").write_text(text)
        found: dict[str, Any] = json.loads(text)
        return found

    def _command(self, tree: Path, arguments: Sequence[str]) -> str:
        left = self._until - time.monotonic()
        label = f"{arguments[0]} of {tree}: {' '.join(arguments[1:])}"
        if left <= 0:
            self.skipped.append(f"no time left: {label}")
            raise NotMeasuredError
        print(f"{left:.0f} s left: {label}", flush=True)
        path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "orchestrator", *arguments, "--device", self._device],
                cwd=tree,
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            self.skipped.append(f"no time left: {label}")
            raise NotMeasuredError from error
        if done.returncode:
            print(done.stderr[-3000:], flush=True)
            self.skipped.append(f"failed: {label}")
            raise NotMeasuredError
        return done.stdout


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout of this project")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--minutes", type=float, default=7.5, help="in all [%(default)s]")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes; writes nothing")
    parser.add_argument("--folder", type=Path, help="where all files stay [a temporary folder]")
    given = parser.parse_args()
    case, load = TINY if given.tiny else FULL, load_average()
    trees = {"before": given.before.resolve(), "after": given.after.resolve()}
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as name:
        folder = (given.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        session = Session(folder, given.device, minutes=given.minutes)
        layer = _layer(case, given.device)
        _write_inputs(folder, case)
        runs = _runs(session, ("after", trees["after"]))
        models = ["model", *(f"after-{m}/model" for m in METHODS if (m, "after") in runs)]
        speeds = _speeds(session, trees["after"], models, case)
        ideal = _ideal(folder, models, case)
        runs |= _runs(session, ("before", trees["before"]))  # they take the longest
    _report(case, given.device, runs, speeds, ideal, layer, session, load=load, keep=not given.tiny)


def _write_inputs(folder: Path, case: Case) -> None:
    config = config_of(
        "llama-2-7b",
        num_layers=case.num_layers,
        shrink=case.shrink,
        vocabulary=case.vocabulary,
    )
    write_checkpoint(folder / "model", config)
    for name, count in (("calibration", case.sequences), ("evaluation", 8)):
        write_tokens(
            folder / f"{name}.safetensors",
            num_sequences=count,
            sequence_length=case.length,
            vocabulary=case.vocabulary,
        )


def _runs(session: Session, tree: tuple[str, Path]) -> dict[tuple[str, str], dict[str, float]]:
    """Return (method, name of the tree) -> seconds of its runs."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for method in METHODS:
        try:
            found[method, tree[0]] = session.run(tree[1], method, f"{tree[0]}-{method}")
        except NotMeasuredError:
            continue
    return found


def _speeds(
    session: Session, tree: Path, models: Sequence[str], case: Case
) -> list[tuple[str, str, str, float]]:
    """Return (model, what, mode, tokens per second) of each setting that was measured."""
    try:
        document = session.bench(tree, models, case)
    except NotMeasuredError:
        return []
    batches = {"prefill": case.prefill, "decode": case.decode}
    return [
        (model, part, row["mode"], row[f"{part}_tokens_per_second"])
        for model, said in zip(models, document["models"].values(), strict=True)
        for row in said["settings"]
        for part, batch in batches.items()
        if row["batch"] == batch and "not_measured" not in row
        if part == "decode" or row["mode"] == EAGER  # no prompt passes a graph
    ]


def _ideal(folder: Path, models: Sequence[str], case: Case) -> dict[str, dict[str, float]]:
    """Return model -> the ratios of operations and of bytes read for a token, dense over its."""
    sizes, cached = {}, case.decode * case.prompt
    for model in models:
        checkpoint = Checkpoint(str(folder / model))
        shape = checkpoint.shape
        flops = forward_flops(
            shape,
            tokens=case.prefill * case.prompt,
            sequence_length=case.prompt,
            form=checkpoint.form,
        )
        heads = sum(layer.qk_head_dim + layer.vo_head_dim for layer in checkpoint.form.layers)
        elements = cached * shape.num_kv_heads * heads
        sizes[model] = flops, model_parameters(shape, checkpoint.form) + elements
    dense = sizes[models[0]]
    return {
        model: {"prefill": dense[0] / flops, "decode": dense[1] / elements}
        for model, (flops, elements) in sizes.items()
    }


def _layer(case: Case, device: str) -> tuple[float, float, int]:
    """Return seconds of a layer of 70B shapes with its grams, of bare products, and operations."""
    config = config_of("llama-2-70b", num_layers=1, shrink=case.shrink // 2 or 1, vocabulary=512)
    shape = family_of("llama").shape_of(config, "bfloat16")
    return layer_rates(config, shape, case.layer_tokens, torch.bfloat16, device=device)


def _report(  # noqa: PLR0913 all that was measured
    case: Case,
    device: str,
    runs: Mapping[tuple[str, str], Mapping[str, float]],
    speeds: Sequence[tuple[str, str, str, float]],
    ideal: Mapping[str, Mapping[str, float]],
    layer: tuple[float, float, int],
    session: Session,
    *,
    load: str,
    keep: bool,
) -> None:
    goals = [
        Goal(
            text=f"a layer of 70B shapes with grams: at least {LAYER_GOAL} of the bare products",
            measured=f"{layer[1] / layer[0]:.3f}",
            met=layer[1] / layer[0] >= LAYER_GOAL,
        )
    ]
    for method in METHODS:
        if {(method, "before"), (method, "after")} <= runs.keys():
            ratio = runs[method, "after"]["wall"] / runs[method, "before"]["wall"]
            text = f"{method}: at most {WALL_GOAL} of the wall time before"
            goals.append(Goal(text=text, measured=f"{ratio:.2f}", met=ratio <= WALL_GOAL))
    rates = {(model, part, mode): rate for model, part, mode, rate in speeds}
    rows = []
    for (model, part, mode), rate in rates.items():
        ratio = rate / rates["model", part, mode]
        rows.append(
            (model, part, mode, f"{rate:,.0f}", f"{ratio:.2f}", f"{ideal[model][part]:.2f}")
        )
        method = model.removeprefix("after-").removesuffix("/model")
        if method in SPEED_GOALS and (part == "prefill" or mode != EAGER):
            goal = SPEED_GOALS[method][part]
            text = f"{method}, {part}, {mode}: at least {goal} of the dense model"
            goals.append(Goal(text=text, measured=f"{ratio:.2f}", met=ratio >= goal))
    seconds = [
        (method, tree, f"{found['wall']:.1f}", *(f"{found.get(p, 0.0):.1f}" for p in PHASES))
        for (method, tree), found in runs.items()
    ]
    card = torch.cuda.get_device_name() if device == "cuda" else "none: on the processor"
    report(
        Result(
            claim="gpu_run",
            method=METHOD,
            configuration={
                "card": card,
                "model": f"Llama-2-7B shapes / {case.shrink}, {case.num_layers} layers, bfloat16, "
                "random weights",
                "calibration": f"{case.sequences} x {case.length} tokens",
                "layer": f"{case.layer_tokens} tokens, {layer[2] / 1e12:.2f} TFLOP",
            },
            tables={
                "Runs, seconds:": table(("method", "tree", "wall", *PHASES), seconds),
                "Speed:": table(("model", "part", "mode", "tokens/s", "of dense", "ideal"), rows),
            },
            goals=goals,
            notes=[f"Not measured: {each}" for each in session.skipped],
            load=load,
        ),
        keep=keep,
    )


if __name__ == "__main__":
    main()
