"""Recovery costs what it has to: its steps beside bare passes, its memory beside the plan.

Goals: the step loop of `global` takes at most 3.5 times the processor time of a bare loop over the
same tokens (forward and backward of the student, forward of the teacher, nothing else), trials of
rates and held-out measurements included or not; the peak of a worker that trains a whole model, and
of a unit of `local`, is within 10 % of its plan.

Steps: `babyllama105`, 32 steps of 8 x 256 tokens in two parts, in one process of one thread, bare
loop and ours in turn. Start (loading models and tokens, moments) is apart.

Memory: a random model of real widths (hidden 576, FFN 1536, 6 layers, vocabulary 49,152, sequences
of 1024), each case in a fresh process: anonymous memory above what the imports took, sampled every
20 ms, beside `planners.memory.training`, which counts no libraries.

    .venv/bin/python benchmarks/recover_cost.py [--rounds N] [--folder DIR] [--quick]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from result_file import ROOT, Goal, Result, load_average, report, table
from safetensors.torch import load_file
from torch import distributed
from trained import SHARED, at_hand, stored, with_code_apart

from actors.devices.memory import PeakMemory, release_freed_memory
from actors.messages import TrainRequest
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.sample_model import write_sample
from actors.storage.tokens import tokens_to_parquet
from actors.training.group import Alone, Processes
from actors.training.loop import train
from actors.training.trained import made
from actors.training.whole_model import WholeModel
from planners.recovery import Recovery

TOY = "babyllama105"
UNIFORM = {"method": "modegpt", "options.allocation": "uniform", "keep_fraction": 0.8}
LOW_RANK = {"method": "svdllm", "keep_fraction": 0.8}
SLICED = {"method": "slicegpt", "keep_fraction": 0.8}
STUDENTS = {"modegpt": UNIFORM, "svdllm": LOW_RANK}
STEPS, BATCH, PARTS, LENGTH = 32, 8, 2, 256
WORKERS = 2  # of a divided model
RATES = {"one rate": (0.003,), "two rates tried": (0.01, 0.003)}
TIMES_GOAL, BYTES_GOAL = 3.5, 0.10
WIDE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
LONG = 1024
METHOD = (__doc__ or "").partition("\n\n")[2].partition("\n\n    ")[0]


class _EnoughError(Exception):
    """The run has come to where it is of interest."""


def run_until(recipe: Mapping[str, Any], kind: str, phase: str) -> Any:
    """Do a run in this process until a phase begins or ends; return it as it was prepared."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    def listener(event: Mapping[str, Any]) -> None:
        if (event["kind"], event["unit"]) == (kind, phase):
            raise _EnoughError

    prepared = prepare(load_config(None, {**recipe, "threads": 1}))
    open_run(prepared)
    try:
        run_on(prepared, LocalExecutor(), listener=listener)
    except _EnoughError:
        return prepared
    raise RuntimeError(f"no {phase} {kind}")


# -- Steps --


def request_of(run: Path, student: str, dense: str, how: Recovery) -> TrainRequest:
    """Return a request to train in a directory where `RECOVERY_TOKENS` are."""
    return TrainRequest(
        unit="recover-model",
        fingerprint=str(time.monotonic_ns()),  # nothing is resumed
        run_uri=str(run),
        student_uri=student,
        checkpoint_uri=dense,
        recovery=how,
        tokens="tokens/recovery.parquet",
        dtype="float32",
        threads=1,
        device="cpu",
        save_every=64,
        stop="training/stop",
    )


def bare_loop(student: str, dense: str, ids: torch.Tensor) -> float:
    """Return the processor seconds of bare passes over the tokens of a training."""
    small, large = (
        WholeModel(Checkpoint(uri), dtype=torch.float32, device="cpu") for uri in (student, dense)
    )
    checkpoint = Checkpoint(dense)
    for prefix, layer in small.layers.items():
        for name in made(layer, checkpoint.read_prefix(prefix)):
            layer.get_parameter(name).requires_grad_()
    begun = time.process_time()
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(ids)
        for part in torch.split(ids[rows], BATCH // PARTS):
            with torch.no_grad():
                log_p = large.module(part).logits.log_softmax(-1)
            log_q = small.module(part).logits.log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            loss.backward()
        small.module.zero_grad()
    return time.process_time() - begun


def our_loop(run: Path, student: str, dense: str, how: Recovery) -> tuple[float, float]:
    """Return the processor seconds of the step loop, and of all before and behind it."""
    from actors.training import resume

    follow, spent = resume.follow, [0.0]

    def timed(*arguments: Any, **more: Any) -> bool:
        begun = time.process_time()
        found = follow(*arguments, **more)
        spent[0] = time.process_time() - begun
        return found

    begun = time.process_time()
    with patch.object(resume, "follow", timed):
        train(request_of(run, student, dense, how), Alone())
    return spent[0], time.process_time() - begun - spent[0]


def step_costs(folder: Path, *, rounds: int) -> list[dict[str, Any]]:
    """Return for each student and way the ratios of all rounds."""
    dense, found = str(SHARED / "models" / TOY), []
    ids = load_file(SHARED / f"reference/{TOY}.calibration.safetensors")["input_ids"]
    Directory(str(folder)).write("tokens/recovery.parquet", tokens_to_parquet(ids.numpy(), {}))
    for name, cut in STUDENTS.items():
        path = folder / f"{name}.json"
        if path.is_file():  # of an earlier call
            found.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        run_until({**stored(TOY), **cut, "out": str(folder / name)}, "phase begins", "verify")
        student = str(folder / name / "model")
        seconds: dict[str, list[float]] = {way: [] for way in ("bare", *RATES, "start")}
        for _ in range(rounds):
            seconds["bare"].append(bare_loop(student, dense, ids))
            for way, rates in RATES.items():
                how = Recovery(mode="global", steps=STEPS, batch=BATCH, parts=PARTS, rates=rates,
                               held_out=16, sequences=len(ids), length=LENGTH)  # fmt: skip
                loop, start = our_loop(folder, student, dense, how)
                seconds[way].append(loop)
                seconds["start"].append(start)
            print(name, {way: round(value[-1], 2) for way, value in seconds.items()}, flush=True)
        found.append({"student": name, **seconds})
        path.write_text(json.dumps(found[-1]), encoding="utf-8")
    return found


# -- Memory --


def write_wide(folder: Path) -> None:
    """Write the model of real widths with its tokens, and compressed ones."""
    sequences = {"calibration": (8, LONG), "evaluation": (1, LONG)}
    if not (folder / "dense").is_dir():
        write_sample(Directory(str(folder / "dense")), WIDE, sequences=sequences)
    for name, cut in STUDENTS.items():
        run_until(
            {**wide_recipe(folder), **cut, "out": str(folder / name)}, "phase begins", "verify"
        )


def wide_recipe(folder: Path) -> dict[str, Any]:
    """Return the keys of a recipe for that model."""
    return {
        "model": str(folder / "dense"),
        "calibration.source": f"tokens:{folder}/dense/calibration.safetensors",
        "evaluation.source": f"tokens:{folder}/dense/evaluation.safetensors",
        "device": "cpu",
    }


def cases(folder: Path) -> list[dict[str, Any]]:
    """Return what memory is measured of."""
    whole = [
        {"what": "global", "cut": cut, "trains": trains, "loss": loss, "size": size}
        for cut, trains, loss in (
            ("dense", "all", "kl"),
            ("modegpt", "made", "kl"),
            ("svdllm", "made", "kl"),
            ("modegpt", "lora", "kl"),
            ("modegpt", "all", "labels"),
        )
        for size in (1, 2)
        if (cut, size) != ("svdllm", 2)
    ]
    divided = [
        {"what": "divided", "cut": cut, "trains": trains, "loss": "kl", "size": 1, "parts": parts}
        for cut, trains, parts in (
            ("modegpt", "all", 2),
            ("modegpt", "all", 4),
            ("svdllm", "made", 2),
            ("modegpt", "lora", 2),
        )
    ]
    layers = [
        {"what": "local", "cut": cut, "trains": trains, "loss": "", "size": size}
        for cut, trains in (("modegpt", "made"), ("slicegpt", "made"), ("modegpt", "lora"))
        for size in (1, 2)
    ]
    return [{**each, "folder": str(folder)} for each in layers + whole + divided]


def memory_of(case: Mapping[str, Any]) -> dict[str, int]:
    """Return the planned and the measured peak of one case, in this fresh process."""
    torch.set_num_threads(1)
    warm = torch.randn(64, 64, requires_grad=True)  # what autograd allocates at its first use
    (warm @ warm).sum().backward()
    measure = {"global": _of_model, "divided": _of_model, "local": _of_layer}[case["what"]]
    return measure(case, Path(case["folder"]))


def _of_model(case: Mapping[str, Any], folder: Path) -> dict[str, int]:
    from planners.memory.training import model_parts

    dense = folder / "dense"
    student = dense if case["cut"] == "dense" else folder / case["cut"] / "model"
    shape, compressed = Checkpoint(str(dense)).shape, Checkpoint(str(student))
    parts = case.get("parts", PARTS)
    batch, held = parts * case["size"], 2
    ids = torch.randint(0, WIDE["vocab_size"], (2 * batch + held, LONG))
    how = Recovery(mode="global", trains=case["trains"], loss=case["loss"], steps=2, batch=batch,
                   parts=parts, rates=(0.001,), held_out=held, length=LONG,
                   sequences=len(ids))  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = Path(name)
        Directory(name).write("tokens/recovery.parquet", tokens_to_parquet(ids.numpy(), {}))
        asked = request_of(run, str(student), str(dense), how)
        release_freed_memory()
        workers = WORKERS if case["what"] == "divided" else 1
        if workers == 1:
            peak = PeakMemory("cpu")
            train(asked, Alone())
            measured = peak.bytes()
        else:
            measured = max(_together(replace(asked, divided=True), name))
    planned = model_parts(
        compressed.shape, compressed.form, shape, how, dtype="float32", workers=workers
    )
    return {"planned": sum(planned.values()), "measured": measured}


def _together(asked: TrainRequest, folder: str) -> list[int]:
    """Return the peak of each of the workers of a group, processes of their own."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    group = [
        context.Process(target=_one_of_several, args=(asked, rank, f"{folder}/meeting", told))
        for rank in range(WORKERS)
    ]
    for each in group:
        each.start()
    found = [told.get() for _ in group]
    for each in group:
        each.join()
    return found


def _one_of_several(asked: TrainRequest, rank: int, meeting: str, told: Any) -> None:
    torch.set_num_threads(1)
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS
    )
    release_freed_memory()
    peak = PeakMemory("cpu")
    train(asked, Processes())
    told.put(peak.bytes())


def _of_layer(case: Mapping[str, Any], folder: Path) -> dict[str, int]:
    from actors.layer_units import registry
    from planners.memory.peaks import Shrinking
    from planners.memory.training import layer_unit

    unit, peaks = registry.FUNCTIONS["recover_layer"], []

    def watched(*arguments: Any) -> Any:
        release_freed_memory()
        peak = PeakMemory("cpu")
        found = unit(*arguments)
        peaks.append(peak.bytes())
        return found

    cut = SLICED if case["cut"] == "slicegpt" else UNIFORM
    training = {
        "mode": "local",
        "trains": case["trains"],
        "batch": PARTS * case["size"],
        "tokens": 2 * PARTS * case["size"] * LONG,
        "held_out": 2,
        "learning_rates": [0.001],
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        recipe = {**wide_recipe(folder), **cut, "recover": training, "out": f"{name}/run"}
        with patch.dict(registry.FUNCTIONS, recover_layer=watched):
            prepared = run_until(recipe, "phase ends", "recover")
    plan, batching = prepared.plan, prepared.identity.batching
    step = Shrinking(
        shape=plan.shape,
        form=plan.form,
        spec=prepared.spec,
        options=prepared.options,
        tokens=(batching.microbatch_tokens, batching.tokens),
        sequence_length=batching.sequence_length,
        dtype=batching.dtype,
        start=prepared.start.form,
        recovery=prepared.recovery,
    )
    return {"planned": layer_unit(step), "measured": max(peaks)}


def apart(case: Mapping[str, Any]) -> dict[str, int]:
    """Return `memory_of` a case, from a fresh process, of this or an earlier call of the script."""
    path = Path(case["folder"]) / f"{label(case).replace(' ', '_')}.json"
    if not path.is_file():
        path.write_text(json.dumps(_from_a_process(case)), encoding="utf-8")
    found: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    print(label(case), found, f"{found['measured'] / found['planned'] - 1:+.1%}", flush=True)
    return found


def _from_a_process(case: Mapping[str, Any]) -> dict[str, int]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def label(case: Mapping[str, Any]) -> str:
    """Return the name of a case in the table."""
    loss = f" {case['loss']}" if case["loss"] else ""
    parts = f", {case['parts']} parts" if "parts" in case else ""
    return f"{case['what']} {case['cut']} {case['trains']}{loss}, {case['size']} a part{parts}"


# -- Result --


def main() -> None:
    """Measure steps, then memory, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--folder", type=Path, help="scratch [a temporary folder]")
    parser.add_argument("--quick", action="store_true", help="one round, one case; writes nothing")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(memory_of(given.case)))
        return
    if not at_hand(TOY):
        return
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="recover-cost-") as scratch:
        folder = given.folder or Path(scratch)
        steps = step_costs(folder / "steps", rounds=1 if given.quick else given.rounds)
        write_wide(folder / "wide")
        chosen = cases(folder / "wide")[: 1 if given.quick else None]
        memory = {label(case): apart(case) for case in chosen}
    _report(steps, memory, load=load, keep=not given.quick)


def _report(
    steps: list[dict[str, Any]], memory: Mapping[str, Mapping[str, int]], *, load: str, keep: bool
) -> None:
    ratios = {
        (one["student"], way): [
            ours / bare for ours, bare in zip(one[way], one["bare"], strict=True)
        ]
        for one in steps
        for way in RATES
    }
    medians = {key: statistics.median(each) for key, each in ratios.items()}
    per_step = [
        (one["student"], way, *(f"{statistics.median(one[k]):.2f}" for k in ("bare", way, "start")),
         f"{medians[one['student'], way]:.2f}",
         " ".join(f"{r:.2f}" for r in ratios[one["student"], way]))
        for one in steps for way in RATES
    ]  # fmt: skip
    off = {name: one["measured"] / one["planned"] - 1 for name, one in memory.items()}
    held = [
        (name, *(f"{one[key] / 1e6:,.1f}" for key in ("planned", "measured")), f"{off[name]:+.1%}")
        for name, one in memory.items()
    ]
    worst = max(off, key=lambda name: abs(off[name]))
    columns = ("student", "rates", "bare, s", "loop, s", "start, s", "median ratio", "each")
    report(
        Result(
            claim="recover_cost",
            method=METHOD,
            configuration={
                "steps": f"{STEPS} of {BATCH} x {LENGTH} in {PARTS} parts, 16 held out, "
                "measured 9 times; with two rates 16 more steps and 2 more measurements",
                "students": STUDENTS,
                "model of real widths": WIDE,
                "memory": f"{PARTS} parts of 1 or 2 sequences of {LONG}, 2 steps, 2 held out",
            },
            tables={
                "Processor seconds:": table(columns, per_step),
                "Peak of a worker, MB:": table(("case", "planned", "measured", "off"), held),
            },
            goals=[
                Goal(
                    text=f"{student}, {way}: at most {TIMES_GOAL} times the bare loop",
                    measured=f"{median:.2f}",
                    met=median <= TIMES_GOAL,
                )
                for (student, way), median in medians.items()
            ]
            + [
                Goal(
                    text=f"every peak within {BYTES_GOAL:.0%} of the plan",
                    measured=f"{off[worst]:+.1%}, {worst}",
                    met=abs(off[worst]) <= BYTES_GOAL,
                )
            ],
            load=load,
        ),
        keep=keep,
    )


if __name__ == "__main__":
    with_code_apart(main)
