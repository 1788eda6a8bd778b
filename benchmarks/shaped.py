"""Random checkpoints of true layer shapes, and runs on them whose memory is watched."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_file import ROOT
from safetensors.torch import save_file

from actors.devices.memory import PeakMemory
from actors.storage.checkpoint import INDEX, Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.backend.local import LocalExecutor
from orchestrator.phases.open_run import check_run, open_run
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.reading import load_config
from orchestrator.run import run_on
from planners.catalogue import CONFIGS
from planners.families import family_of

SCALE = 0.02  # standard deviation of a weight
VOCABULARY = 512  # of models whose layers alone matter
GIB = 2**30


def config_of(
    name: str, *, num_layers: int, shrink: int = 1, vocabulary: int | None = None
) -> dict[str, Any]:
    """Return the config of a model of the catalogue with fewer layers, its widths over ``shrink``.

    The head dim stays, so the number of heads shrinks with the widths.
    """
    config = dict(CONFIGS[name])
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        config[key] //= shrink
    config["num_key_value_heads"] = max(1, config["num_key_value_heads"] // shrink)
    return {
        **config,
        "num_hidden_layers": num_layers,
        "vocab_size": vocabulary or config["vocab_size"],
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> None:
    """Write random bfloat16 weights, a file a layer; a file that is there is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(config["model_type"])
    shape = family.shape_of(config, "bfloat16")
    files = {"outer.safetensors": dict(family.outer_tensors(shape).values())}
    for layer in range(shape.num_layers):
        tensors = family.layer_tensors(shape, layer)
        files[f"layer-{layer:05d}.safetensors"] = dict(tensors.values())
    for number, (file, tensors) in enumerate(files.items()):
        if not (folder / file).exists():
            generator = torch.Generator().manual_seed(number)
            made = {name: _random(dims, generator) for name, dims in tensors.items()}
            save_file(made, folder / f"{file}.part", metadata={"format": "pt"})
            (folder / f"{file}.part").rename(folder / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(str(folder)).shape == shape


def _random(dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(dims) == 1:
        return torch.ones(dims, dtype=torch.bfloat16)
    # Rows repeat after a while: what matters is that they are there, and not made for minutes.
    rows = min(dims[0], 1024)
    some = torch.randn(rows, dims[1], generator=generator).mul_(SCALE).bfloat16()
    return some.repeat(-(-dims[0] // rows), 1)[: dims[0]].contiguous()


def write_tokens(path: Path, *, num_sequences: int, sequence_length: int, vocabulary: int) -> None:
    """Write random tokens, seed 0."""
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(num_sequences, sequence_length))
    save_file({"input_ids": torch.from_numpy(ids)}, path)


class MeasuredError(Exception):
    """The run has come to its verification, to which it is measured."""


def layer_by_layer(recipe: Mapping[str, Any]) -> Prepared:
    """Return a run whose plan has each layer in a wave of its own, though more may fit."""
    prepared = prepare(load_config(None, recipe))
    plan = prepared.plan
    stage, count = plan.waves[0][0], plan.shape.num_layers
    waves = tuple(
        (replace(stage, first=i, last=i + 1, embedding=i == 0, head=i == count - 1),)
        for i in range(count)
    )
    return replace(prepared, plan=replace(plan, waves=waves))


def run_here(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Do a run `layer_by_layer`, or what is left of it, here; return its memory and its seconds.

    Driver and worker are one process here, so the peak is of both.
    """
    peak = PeakMemory()  # everything is imported by now
    prepared = layer_by_layer(recipe)
    if not check_run(prepared):
        open_run(prepared)
    begun = time.perf_counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    peaks: list[tuple[str, int]] = []
    starts: dict[str, float] = {}

    def listen(event: Mapping[str, Any]) -> None:
        if event["kind"] == "phase begins":
            starts[event["unit"]] = time.perf_counter()
            if event["unit"] == "verify":
                raise MeasuredError
        elif event["kind"] == "phase ends":
            seconds[event["unit"]] += time.perf_counter() - starts[event["unit"]]
            peaks.append((event["unit"], peak.bytes()))

    with contextlib.suppress(MeasuredError):
        run_on(prepared, LocalExecutor(), listener=listen)
    run = Directory(prepared.config.out)
    records = read_records(run)
    plan = prepared.plan
    return {
        "peak_bytes": peak.bytes(),
        "planned_bytes": plan.worker_bytes,
        "planned_by_kind": dict(plan.waves[0][0].bytes),
        "num_waves": len(plan.waves),
        "disk_planned_bytes": plan.disk_bytes,
        "disk_bytes": sum(run.size(name) or 0 for name in run.names()),
        "seconds": {"total": time.perf_counter() - begun, **seconds},
        "peaks": peaks,
        "units": {
            name: record.seconds
            for name, record in records.items()
            if name.startswith(("layer-", "basis-", "statistics-", "damage-"))
        },
        "rungs": {name: r.values["rungs"] for name, r in records.items() if "rungs" in r.values},
        "losses": _losses(records),
    }


def _losses(records: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for model in ("dense", "compressed"):
        parts = [r.values for name, r in records.items() if name.startswith(f"evaluation-{model}")]
        if parts:
            nats = sum(part["nats"] for part in parts)
            found[model] = math.exp(nats / sum(part["num_tokens"] for part in parts))
    return found


def run_apart(script: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Do `run_here` in a fresh process, by running ``script --recipe JSON``."""
    arguments = [sys.executable, str(script), "--recipe", json.dumps(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def gib(count: float) -> str:
    """Return bytes as GiB with two decimals."""
    return f"{count / GIB:.2f}"
