"""On a real language model MoDeGPT by measured damage loses least, at equal true size.

Claim, on SmolLM2-135M-Instruct and WikiText-2 at true keep_fraction 0.8: ``allocation=marginal``
of MoDeGPT has a lower perplexity than its published allocation, SVD-LLM and SliceGPT; each result
is within 0.5 % of the target, from below; and the dense perplexity is what transformers computes.

Method: a whole run of the orchestrator for each row, in this process, on the model and tokens that
``real_models.py`` makes, which a fresh clone has not. A row takes about 20 minutes on an idle core,
so one that is done is kept beside the model: at the same commit, without changes, the same command
resumes, and another process may make some of the rows at the same time (``--only``).

    .venv/bin/python benchmarks/real_table.py [--real FOLDER] [--only ROW ...] [--quick]
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real_models import (
    DENSE_PERPLEXITY,
    GGUF,
    GGUF_SHA256,
    LENGTH,
    OUT,
    PACKAGE,
    TEXTS,
    TOLERANCE,
    real,
)
from result_file import Goal, Result, commit, load_average, report, table
from trained import nobody, with_code_apart

KEEP_FRACTION = 0.8
MAX_BELOW = 0.005  # of the target
THREADS = 1
PHASES = ("calibrate", "allocate", "compress", "evaluate")
METHOD = """\
A whole run of the orchestrator (calibrate, allocate, compress, stitch, evaluate, verify) in this
process for each row, each with a calibration of its own. The model is SmolLM2-135M-Instruct with
weights of 4 bits dequantised to bfloat16, as `benchmarks/real_models.py` makes it; so numbers are
comparable with each other, not with those of the published model. Calibration data: the first
48 sequences of 1,024 tokens of the valid part of WikiText-2; perplexity: the first 20 of the test
part, 20,460 predictions. Options are the defaults but for those named. Kept: true parameters over
those of the input. Seconds: of the whole run, verification and timed inference included, and of
four of its phases; evaluation is of both models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One compression that is measured; options that are not named have their defaults."""

    name: str
    method: str
    options: Mapping[str, str] = field(default_factory=dict)


BEST = Row(name="marginal", method="modegpt", options={"allocation": "marginal"})
ROWS = (
    BEST,
    Row(name="influence", method="modegpt", options={"allocation": "influence"}),
    Row(name="svdllm", method="svdllm"),
    Row(name="slicegpt", method="slicegpt"),
    Row(name="slicegpt-tied", method="slicegpt", options={"head_shortcut": "true"}),
)

Found = Mapping[str, Mapping[str, Any]]  # name of a row -> report of its run


def measure(
    row: Row, keys: Mapping[str, Any], run: Path, *, keep_fraction: float = KEEP_FRACTION
) -> dict[str, Any]:
    """Return the report of a row's run in that directory, made or resumed."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    given = {
        **keys,
        "out": str(run),
        "method": row.method,
        "keep_fraction": keep_fraction,
        "threads": THREADS,
        **{f"options.{key}": value for key, value in row.options.items()},
    }
    prepared = prepare(load_config(None, given))
    open_run(prepared)
    return run_on(prepared, LocalExecutor(), listener=nobody)


def stored_or_measured(row: Row, keys: Mapping[str, Any], kept: Path) -> dict[str, Any]:
    """Return the report of a row, from its file if an earlier call of this script made it."""
    path = kept / f"{row.name}.json"  # a result of other code is in another folder
    if not path.is_file():
        found = measure(row, keys, kept / row.name)
        shutil.rmtree(kept / row.name)
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(_line(row, found))
    return found


def _line(row: Row, found: Mapping[str, Any]) -> str:
    compressed, dense = (_perplexity(found, which) for which in ("compressed", "dense"))
    return f"{row.name}: {compressed:.2f} (dense {dense:.2f}), {_kept(found):.4f} kept"


def _perplexity(found: Mapping[str, Any], which: str) -> float:
    return float(found["evaluation"][which]["perplexity"])


def _kept(found: Mapping[str, Any]) -> float:
    return float(found["parameters"]["keep_fraction"])


def goals_of(found: Found) -> list[Goal]:
    """Return what was to be shown."""
    dense = {_perplexity(one, "dense") for one in found.values()}
    best = _perplexity(found[BEST.name], "compressed")
    others = [_perplexity(one, "compressed") for name, one in found.items() if name != BEST.name]
    below = {name: KEEP_FRACTION - _kept(one) for name, one in found.items()}
    return [
        Goal(
            text=f"dense perplexity {DENSE_PERPLEXITY}, that of transformers alone, in each run",
            measured=" and ".join(f"{value:.4f}" for value in sorted(dense)),
            met=all(abs(value / DENSE_PERPLEXITY - 1) <= TOLERANCE for value in dense),
        ),
        Goal(
            text=f"kept: at most {MAX_BELOW:.1%} of the target below it, never above",
            measured=", ".join(f"{name} {value:.4f} below" for name, value in below.items()),
            met=all(0 <= value <= MAX_BELOW * KEEP_FRACTION for value in below.values()),
        ),
        Goal(
            text="modegpt, allocation=marginal has the lowest perplexity",
            measured=f"{best:.2f}, the next {min(others):.2f}",
            met=best < min(others),
        ),
    ]


def table_of(found: Found) -> str:
    """Return the rows as Markdown."""
    first = found[BEST.name]
    before = f"{first['parameters']['before']:,}"
    lines = [("dense", "", "1.0000", before, f"{_perplexity(first, 'dense'):.2f}", *[""] * 6)]
    for row in ROWS:
        one = found[row.name]
        dense, compressed = (_perplexity(one, which) for which in ("dense", "compressed"))
        own = ", ".join(f"{key}={value}" for key, value in row.options.items())
        lines.append(
            (
                row.method,
                own,
                f"{_kept(one):.4f}",
                f"{one['parameters']['after']:,}",
                f"{compressed:.2f}",
                f"{compressed / dense:.3f}",
                f"{one['seconds']['total']:.0f}",
                *(f"{one['seconds'][phase]:.0f}" for phase in PHASES),
            )
        )
    columns = ("method", "options", "kept", "parameters", "perplexity", "over dense", "seconds")
    return table((*columns, *PHASES), lines)


def configuration_of(found: Found) -> dict[str, object]:
    """Return all that a repetition must set."""
    options = {name: one["method"]["steps"][0]["options"] for name, one in found.items()}
    return {
        "model": f"{GGUF} of {PACKAGE}, sha256 {GGUF_SHA256}, dequantised to bfloat16",
        **{
            use: f"the first {sequences} x {LENGTH} tokens of {text}, word joins undone"
            for use, (text, sequences) in TEXTS.items()
        },
        "keep_fraction": KEEP_FRACTION,
        "threads": THREADS,
        "dtype": "float32",
        "executor": "LocalExecutor",
        **{
            f"options of {name}": ", ".join(f"{key}={value}" for key, value in own.items())
            for name, own in options.items()
        },
    }


def main() -> None:
    """Make every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--real", type=Path, default=OUT, help="folder of real_models.py")
    parser.add_argument(
        "--only", nargs="+", choices=[r.name for r in ROWS], help="make these rows, and no table"
    )
    parser.add_argument(
        "--quick", action="store_true", help="all rows on few sequences; writes nothing"
    )
    given = parser.parse_args()
    keys = real(given.real)
    if keys is None:
        return
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="real-table-") as folder:
        code = commit()
        resumes = not given.quick and code.isalnum()  # with changes on top it names no code
        kept = given.real / "rows" / code if resumes else Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        if given.quick:
            keys |= {f"{use}.sequences": 4 for use in TEXTS}
        rows = [row for row in ROWS if not given.only or row.name in given.only]
        found = {row.name: stored_or_measured(row, keys, kept) for row in rows}
        if given.only:
            return
        report(
            Result(
                claim="real_table",
                method=METHOD,
                configuration=configuration_of(found),
                tables={"SmolLM2-135M-Instruct, WikiText-2:": table_of(found)},
                goals=goals_of(found),
                load=load,
            ),
            keep=not given.quick,
        )


if __name__ == "__main__":
    with_code_apart(main)
