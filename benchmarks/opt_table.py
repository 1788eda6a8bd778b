"""On a small OPT, the family of the papers' tables, MoDeGPT loses less than SliceGPT.

Claim, at true keep_fraction 0.9 and 0.8: the perplexity of MoDeGPT is below that of SliceGPT, and
both runs end READY: LayerNorms, biases, learned positions and heads without rope are compressed.

Method: a whole run of the orchestrator for each row, in this process, on a model that this trains
in minutes from the source of the interpreter's standard library, if it is not there yet:

    .venv/bin/python -m examples.train_tiny --family opt --output benchmarks/.real/opt
    .venv/bin/python benchmarks/opt_table.py [--model FOLDER] [--quick]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from real_models import OUT
from real_table import THREADS, Row, measure
from result_file import Goal, Result, load_average, report, table
from trained import with_code_apart

FRACTIONS = (0.9, 0.8)
# Steps of one channel: in steps of eight, of a width of 96, a target is missed by up to 5 %.
ROWS = tuple(
    Row(name=name, method=name, options={"round_to": "1"}) for name in ("slicegpt", "modegpt")
)
METHOD = """\
A whole run of the orchestrator (calibrate, allocate, compress, stitch, evaluate, verify) in this
process for each row, with the default options but for `round_to=1`. The model is an OPT of 521,472
parameters that `examples/train_tiny.py --family opt` trains on the `.py` files of CPython's
standard library; calibration data and evaluation data are parts of it that it was not trained on,
96 and 48 sequences of 256 tokens. Kept: true parameters over those of the input, a tied head
counted once."""


def keys_of(model: Path) -> dict[str, Any]:
    """Return the recipe's keys for the model and its tokens, on the CPU."""
    return {
        "model": str(model),
        "calibration.source": f"tokens:{model}/calibration.safetensors",
        "evaluation.source": f"tokens:{model}/evaluation.safetensors",
        "device": "cpu",
    }


def main() -> None:
    """Make every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=OUT / "opt", help="folder of train_tiny.py")
    parser.add_argument("--quick", action="store_true", help="few sequences; writes nothing")
    given = parser.parse_args()
    if not (given.model / "config.json").is_file():
        print(f"skipped: no model in {given.model}; make it: train_tiny.py --family opt")
        return
    keys, load = keys_of(given.model), load_average()
    if given.quick:
        keys |= {"calibration.sequences": 8, "evaluation.sequences": 4}
    lines, loss = [], {}
    with tempfile.TemporaryDirectory(prefix="opt-table-") as folder:
        for fraction in FRACTIONS:
            for row in ROWS:
                run = Path(folder) / f"{row.name}-{fraction}"
                found = measure(row, keys, run, keep_fraction=fraction)
                dense, cut = (
                    float(found["evaluation"][which]["perplexity"])
                    for which in ("dense", "compressed")
                )
                kept = found["parameters"]
                loss[row.name, fraction] = cut
                lines.append(
                    (row.method, f"{fraction}", f"{kept['keep_fraction']:.4f}",
                     f"{kept['after']:,}", f"{dense:.3f}", f"{cut:.3f}", found["verdict"])
                )  # fmt: skip
                print(*lines[-1])
    columns = ("method", "target", "kept", "parameters", "dense", "perplexity", "verdict")
    goals = [
        Goal(
            text=f"MoDeGPT below SliceGPT at {fraction}",
            measured=f"{loss['modegpt', fraction]:.3f} and {loss['slicegpt', fraction]:.3f}",
            met=loss["modegpt", fraction] < loss["slicegpt", fraction],
        )
        for fraction in FRACTIONS
    ]
    report(
        Result(
            claim="opt_table",
            method=METHOD,
            configuration={
                "model": "examples/train_tiny.py --family opt, its defaults",
                "threads": THREADS,
                "dtype": "float32",
                "executor": "LocalExecutor",
            },
            tables={"OPT, 4 layers of width 96:": table(columns, lines)},
            goals=goals,
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    with_code_apart(main)
