"""A checkpoint larger than memory is calibrated and compressed, every process within bounds.

Claim: a random-weight checkpoint of Llama-2-13B's shapes, 26 GB in bfloat16, goes through
calibration of a few hundred tokens and MoDeGPT on a machine of 24 GiB. The peak of a worker's
anonymous memory above its imports stays under 6 GiB and under the plan's figure, the driver's
under 1 GiB. With ``--layers N`` the same with fewer layers of the same shapes.

It needs 62 GB of disk for 40 layers, 8 GB for 4. ``--folder DIR`` is kept: the same command goes on
where it was stopped.

    .venv/bin/python benchmarks/out_of_core.py [--layers N] [--folder DIR] [--quick]
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from result_file import Goal, Result, load_average, report, table
from shaped import (
    GIB,
    VOCABULARY,
    MeasuredError,
    config_of,
    gib,
    write_checkpoint,
    write_tokens,
)

from actors.devices.memory import PeakMemory
from actors.storage.files import Directory
from orchestrator.backend import ray_cluster
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.phases.open_run import check_run, open_run
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from orchestrator.run import run_on

MODEL = "llama-2-13b"
LAYERS = 40
SEQUENCES, LENGTH = 4, 128
WORKER_GOAL, DRIVER_GOAL = 6 * GIB, 1 * GIB
METHOD = """\
`compress-cluster run` up to verification: this process is the driver, one worker is a Ray actor of
two threads. Memory is anonymous memory above what imports took, sampled every 20 ms, the driver's
from before the run is prepared; another process has written the checkpoint. Evaluation has one
sequence of the same length. The run is bounded (`worker_gib`) to the 6 GiB of the goal, so that the
plan makes waves. Statistics are stored in float32, which halves their disk."""


def main() -> None:
    """Write the checkpoint, compress it, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="[%(default)s]")
    parser.add_argument("--folder", type=Path, help="scratch that is kept, to go on in")
    parser.add_argument("--threads", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a toy run that writes nothing")
    given = parser.parse_args()
    layers, shrink = (2, 10) if given.quick else (given.layers, 1)
    vocabulary = VOCABULARY if given.quick else None
    config = config_of(MODEL, num_layers=layers, shrink=shrink, vocabulary=vocabulary)
    with tempfile.TemporaryDirectory(prefix="out-of-core-") as scratch:
        folder = given.folder or Path(scratch)
        _require_disk(folder, layers, shrink)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(write_checkpoint, folder / "model", config).result()
        for name, count in (("tokens", SEQUENCES), ("evaluation", 1)):
            write_tokens(
                folder / f"{name}.safetensors",
                num_sequences=count,
                sequence_length=LENGTH,
                vocabulary=config["vocab_size"],
            )
        load = load_average()
        found = _measured(folder, threads=given.threads)
        found["model_bytes"] = sum(f.stat().st_size for f in (folder / "model").iterdir())
    _report(config, found, given, load=load)


def _require_disk(folder: Path, layers: int, shrink: int) -> None:
    needed = (1.5 * layers + 2) / shrink**2 * 1e9  # model, statistics and result
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(folder).free + held
    if free < needed:
        sys.exit(f"{folder}: {free / 1e9:.0f} GB are free, {needed / 1e9:.0f} are needed")


def _measured(folder: Path, *, threads: int) -> dict[str, Any]:
    recipe = {
        "model": str(folder / "model"),
        "method": "modegpt",
        "keep_fraction": 0.8,
        "options.allocation": "uniform",
        "out": str(folder / "run"),
        "calibration.source": f"tokens:{folder}/tokens.safetensors",
        "evaluation.source": f"tokens:{folder}/evaluation.safetensors",
        "calibration.microbatch_tokens": SEQUENCES * LENGTH // 2,
        "calibration_dtype": "bfloat16",
        "statistics_dtype": "float32",
        "device": "cpu",
        "threads": threads,
        "worker_gib": WORKER_GOAL / GIB,
    }
    driver = PeakMemory()
    prepared = prepare(load_config(None, recipe))
    worker_peak, disk_peak = 0, 0
    run = Directory(prepared.config.out)
    seconds: dict[str, float] = {}
    starts: dict[str, float] = {}

    def listen(event: Mapping[str, Any]) -> None:
        nonlocal disk_peak
        if event["kind"] == "phase begins":
            starts[event["unit"]] = time.perf_counter()
            if event["unit"] == "verify":
                raise MeasuredError
        elif event["kind"] == "phase ends":
            seconds[event["unit"]] = time.perf_counter() - starts[event["unit"]]
            disk_peak = max(disk_peak, sum(run.size(name) or 0 for name in run.names()))

    with ray_cluster.connected("local", num_cpus=threads, num_gpus=0, store_bytes=0):
        if not check_run(prepared):
            open_run(prepared)
        executor = _Watching()
        try:
            run_on(prepared, executor, listener=listen)
        except MeasuredError:
            worker_peak = executor.peak_bytes
    return {
        "worker_peak": worker_peak,
        "driver_peak": driver.bytes(),
        "planned": prepared.plan.worker_bytes,
        "disk": disk_peak,
        "disk_planned": prepared.plan.disk_bytes,
        "num_waves": len(prepared.plan.waves),
        "seconds": seconds,
    }


class _Watching(RayExecutor):
    """Keeps the highest peak that any answer of a worker reports."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0

    def result(self, ticket: Any) -> Any:
        """Fetch an answer and look at its peak."""
        answer = super().result(ticket)
        self.peak_bytes = max(self.peak_bytes, getattr(answer, "peak_bytes", 0))
        return answer


def _report(
    config: Mapping[str, Any], found: Mapping[str, Any], given: argparse.Namespace, *, load: str
) -> None:
    rows = [
        ("worker, peak", gib(found["worker_peak"])),
        ("worker, plan", gib(found["planned"])),
        ("driver, peak above its imports", gib(found["driver_peak"])),
        ("checkpoint", gib(found["model_bytes"])),
        ("run directory, largest at the end of a phase", gib(found["disk"])),
        ("run directory, plan", gib(found["disk_planned"])),
        ("waves", found["num_waves"]),
    ]
    seconds = [(phase, f"{spent:.0f}") for phase, spent in found["seconds"].items()]
    whole = config["num_hidden_layers"] == LAYERS
    report(
        Result(
            claim="out_of_core" if whole else f"out_of_core_{config['num_hidden_layers']}_layers",
            method=METHOD,
            configuration={
                "model": json.dumps(dict(config)),
                "tokens": f"{SEQUENCES} x {LENGTH}, random",
                "method": "modegpt, keep_fraction 0.8, uniform",
                "threads": given.threads,
            },
            tables={
                "Bytes, in GiB:": table(("", ""), rows),
                "Seconds:": table(("phase", "seconds"), seconds),
            },
            goals=[
                Goal(
                    text=f"a worker stays under {WORKER_GOAL // GIB} GiB and under the plan",
                    measured=f"{gib(found['worker_peak'])} of {gib(found['planned'])} GiB",
                    met=found["worker_peak"] <= min(WORKER_GOAL, found["planned"]),
                ),
                Goal(
                    text="the driver stays under 1 GiB",
                    measured=f"{gib(found['driver_peak'])} GiB",
                    met=found["driver_peak"] <= DRIVER_GOAL,
                ),
                Goal(
                    text="the run directory is no larger than planned",
                    measured=f"{gib(found['disk'])} of {gib(found['disk_planned'])} GiB",
                    met=found["disk"] <= found["disk_planned"] * 1.02,
                ),
            ],
            notes=[],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()
