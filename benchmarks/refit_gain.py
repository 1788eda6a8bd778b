"""Refitting the output projections takes at least a fifth of MoDeGPT's excess perplexity away.

Claim, on ``babyllama105`` with uniform allocation at true keep_fraction 0.8 and 0.7: a refit lowers
the excess perplexity over dense by at least 20 %, and never raises the held-out loss.

Method: four whole runs in this process on the stored tokens, the refitted ones on the statistics
of the others.

Needs the models and tokens in ``../shared``, which a fresh clone has not, and says so.

    .venv/bin/python benchmarks/refit_gain.py [--quick]
"""

import argparse
import tempfile
from typing import Any

from result_file import Goal, Result, load_average, report, table
from trained import at_hand, nobody, stored, with_code_apart

MODEL = "babyllama105"
FRACTIONS = (0.8, 0.7)
FIFTH = 0.2


def one(folder: str, fraction: float, *, refit: bool, sequences: int | None) -> dict[str, Any]:
    """Return the report of one run."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    given = {
        **stored(MODEL, sequences=sequences),
        "out": f"{folder}/{fraction}-{refit}",
        "method": "modegpt",
        "keep_fraction": fraction,
        "keep_statistics": not refit,
        "stats": f"{folder}/{fraction}-False" if refit else None,
        "threads": 1,
        "options.allocation": "uniform",
        "options.refit": refit,
    }
    prepared = prepare(load_config(None, given))
    open_run(prepared)
    return run_on(prepared, LocalExecutor(), listener=nobody)


def main() -> None:
    """Run, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sequences; nothing is kept")
    quick = parser.parse_args().quick
    if not at_hand(MODEL):
        return
    before = load_average()
    rows, goals = [], []
    with tempfile.TemporaryDirectory() as folder:
        for fraction in FRACTIONS:
            found = [
                one(folder, fraction, refit=refit, sequences=32 if quick else None)
                for refit in (False, True)
            ]
            dense = found[0]["evaluation"]["dense"]["perplexity"]
            plain, refitted = (r["evaluation"]["compressed"]["perplexity"] for r in found)
            removed = 1 - (refitted - dense) / (plain - dense)
            kept = found[1]["parameters"]["keep_fraction"]
            rows.append([fraction, f"{kept:.4f}", f"{plain:.4f}", f"{refitted:.4f}",
                         f"{removed:.1%}", found[1]["refit"]])  # fmt: skip
            goals.append(
                Goal(
                    text=f"{fraction}: refit removes a fifth of the excess perplexity",
                    measured=f"{removed:.1%}",
                    met=removed >= FIFTH,
                )
            )
    columns = ["target", "kept", "without", "refitted", "excess removed", "decision"]
    report(
        Result(
            claim="refit_gain",
            goals=goals,
            tables={f"`{MODEL}`, dense perplexity {dense:.4f}": table(columns, rows)},
            method=__doc__.split("Method: ")[1].split("\n\n")[0],
            configuration={"model": MODEL, "method": "modegpt, allocation=uniform", "threads": "1"},
            load=before,
        ),
        keep=not quick,
    )


if __name__ == "__main__":
    with_code_apart(main)
