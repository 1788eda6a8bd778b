"""The plan tells the truth: bytes of a worker within 10 %, seconds of a phase within 25 %.

Random-weight models of several shapes go through whole runs on a local Ray cluster, one worker of
one thread. Before each, a layer of the same shape is timed (`plan --measure`), so nothing of the
run itself is known to its plan. What `report.json` says was planned is set beside what it was.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_file import Goal, Result, load_average, report, table

from actors.storage.files import Directory
from actors.storage.sample_model import write_sample
from orchestrator.forecast.forecast import forecast_of
from orchestrator.forecast.pricing import Pricing
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from orchestrator.report.numbers import bytes_text, seconds_text
from orchestrator.run import run

BYTES_GOAL, SECONDS_GOAL = 0.10, 0.25
LONG = 3.0  # seconds: a phase that is shorter says nothing of a plan
PHASES = ("calibrate", "evaluate", "allocate", "compress", "refit")
METHOD = (__doc__ or "").partition("\n\n")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run.

    Attributes:
        name: in the table.
        sizes: of the model's ``config.json``.
        recipe: further keys of the run's recipe.
    """

    name: str
    sizes: Mapping[str, int]
    recipe: Mapping[str, Any]


def _llama(hidden: int, intermediate: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


SMALL = _llama(512, 1408, 4, 4096)
LARGE = _llama(1024, 2816, 4, 32000)
UNIFORM = {"options.allocation": "uniform"}
CASES = (
    Case(name="512, slicegpt", sizes=SMALL, recipe={"method": "slicegpt"}),
    Case(name="512, modegpt", sizes=SMALL, recipe={"method": "modegpt", **UNIFORM}),
    Case(name="512, svdllm", sizes=SMALL, recipe={"method": "svdllm"}),
    Case(name="1024, slicegpt", sizes=LARGE, recipe={"method": "slicegpt"}),
    Case(name="1024, modegpt", sizes=LARGE, recipe={"method": "modegpt", **UNIFORM}),
    Case(name="1024, svdllm", sizes=LARGE, recipe={"method": "svdllm"}),
    Case(
        name="512, slicegpt sequential",
        sizes=SMALL,
        recipe={"method": "slicegpt", "options.schedule": "sequential"},
    ),
    Case(
        name="512, modegpt refit",
        sizes=SMALL,
        recipe={"method": "modegpt", "options.refit": "true", **UNIFORM},
    ),
    Case(name="512, modegpt damage", sizes=SMALL, recipe={"method": "modegpt"}),
)


def compare(case: Case, folder: Path, *, sequences: tuple[int, int]) -> dict[str, Any]:
    """Return the report of a run of that case, with what its plan said."""
    length = 512
    counts = dict(zip(("calibration", "evaluation"), sequences, strict=True))
    sizes = {name: (count, length) for name, count in counts.items()}
    write_sample(Directory(str(folder / "model")), case.sizes, sequences=sizes)
    recipe = {
        "model": str(folder / "model"),
        "out": str(folder / "run"),
        "device": "cpu",
        "keep_fraction": 0.8,
        "calibration.source": f"tokens:{folder}/model/calibration.safetensors",
        "calibration.microbatch_tokens": 2048,
        "evaluation.source": f"tokens:{folder}/model/evaluation.safetensors",
        **case.recipe,
    }
    prepared = prepare(load_config(None, recipe))
    found = forecast_of(prepared, Pricing(measure=True))
    return run(prepared, listener=lambda _: None, expected=found.to_json())


def _rows(case: Case, found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[float]]:
    memory = found["memory"]
    planned, peak = memory["planned_worker_bytes"], memory["worker_peak_bytes"]
    held = [case.name, bytes_text(planned), bytes_text(peak), f"{peak / planned - 1:+.1%}"]
    timed, errors = [], []
    phases = found["plan"]["forecast"]["phases"]
    for phase in PHASES:
        actual = found["seconds"][phase]
        if phase not in phases or actual < LONG:
            continue
        expected = phases[phase]["p50"]
        errors.append(actual / expected - 1)
        change = f"{actual / expected - 1:+.1%}"
        timed.append([case.name, phase, seconds_text(expected), seconds_text(actual), change])
    return held, timed, errors


def main() -> None:
    """Compare and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="one toy run; writes nothing")
    given = parser.parse_args()
    cases = CASES[:1] if given.quick else CASES[: given.cases]
    sequences = (8, 4) if given.quick else (48, 16)
    load = load_average()
    held, timed, bytes_off, seconds_off = [], [], [], []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="plan-truth-") as folder:
            found = compare(case, Path(folder), sequences=sequences)
        row, rows, errors = _rows(case, found)
        print(*row, *rows, sep="\n")
        held.append(row)
        timed += rows
        seconds_off += errors
        memory = found["memory"]
        bytes_off.append(memory["worker_peak_bytes"] / memory["planned_worker_bytes"] - 1)
    worst_bytes = max(map(abs, bytes_off))
    worst_seconds = max(map(abs, seconds_off), default=0.0)
    near = sum(abs(e) <= SECONDS_GOAL for e in seconds_off)
    report(
        Result(
            claim="plan_truth",
            method=METHOD,
            configuration={
                "models": "Llama, float32, random weights; hidden 512, intermediate 1408, "
                "vocabulary 4096; hidden 1024, intermediate 2816, vocabulary 32000; 4 layers",
                "calibration": f"{sequences[0]} x 512 tokens in microbatches of 2048",
                "evaluation": f"{sequences[1]} x 512 tokens, both models",
                "workers": "1, of 1 thread",
                "keep_fraction": 0.8,
            },
            tables={
                "Bytes of a worker:": table(("run", "planned", "measured peak", "off"), held),
                f"Seconds of phases of {LONG:g} s and more:": table(
                    ("run", "phase", "planned p50", "measured", "off"), timed
                ),
            },
            goals=[
                Goal(
                    text=f"planned bytes within {BYTES_GOAL:.0%} of the measured peak",
                    measured=f"at most {worst_bytes:.1%} off",
                    met=worst_bytes <= BYTES_GOAL,
                ),
                Goal(
                    text=f"planned seconds within {SECONDS_GOAL:.0%} of the measured",
                    measured=f"at most {worst_seconds:.1%} off; {near} of "
                    f"{len(seconds_off)} within",
                    met=worst_seconds <= SECONDS_GOAL,
                ),
            ],
            notes=[
                "A sample and its run are minutes apart: what else the machine does then is in it.",
            ],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()
