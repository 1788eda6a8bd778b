"""Whether several methods for the same module leave a better model than one.

Claim, on ``babyllama105`` at true keep_fraction 0.9, 0.8, 0.7: where low rank competes with MoDeGPT
for each module of each layer (``candidates=modegpt,svdllm``), the perplexity is not above that of
MoDeGPT alone, both by measured damage (``allocation=marginal``), with the same budget.

Method: a sweep for each choice on its own calibration, each point stitched and measured from its
files, in this process, on the stored tokens.

Needs the models and tokens in ``../shared``, which a fresh clone has not, and says so.

    .venv/bin/python benchmarks/hull_of_methods.py [--quick]
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from result_file import Goal, Result, load_average, report, table
from trained import at_hand, nobody, stored, with_code_apart

MODEL = "babyllama105"
FRACTIONS = (0.9, 0.8, 0.7)
BOTH = {"candidates": "modegpt,svdllm"}
CHOICES: Mapping[str, Mapping[str, str]] = {
    "modegpt alone": {},
    "both": BOTH,
    "modegpt alone, damage=loss": {"damage": "loss"},
    "both, damage=loss": {"damage": "loss", **BOTH},
}
MODULES = ("mlp", "qk", "vo")
MAX_APART = 0.001  # of the true fractions at one target
METHOD = """\
One run a choice: calibrate, measure the damage of all levels once, then compress, stitch and
evaluate at each size, all in this process. All stored calibration (256) and evaluation (128)
sequences of 256 tokens, float32, one thread. MoDeGPT with its defaults (`allocation=marginal`,
`modules=mlp,qk,vo`, `round_to=8`); low rank competes for all linears of a module together. Kept:
true parameters over those of the input, an untied head included. Excess: perplexity above that of
the dense model."""

Points = dict[tuple[str, float], dict[str, Any]]


def sweeps(
    folder: str, *, fractions: Sequence[float], sequences: int | None
) -> tuple[float, Points]:
    """Return the dense perplexity, and (choice, asked) -> point, with who shrinks what."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.experiments.sweep import points_of, sweep_on
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config

    dense, points = 0.0, {}
    for number, (name, options) in enumerate(CHOICES.items()):
        out = f"{folder}/{number}"
        given = {
            **stored(MODEL, sequences=sequences),
            "out": out,
            "method": "modegpt",
            "keep_fraction": 0.9,
            "keep_statistics": True,
            "threads": 1,
            **{f"options.{key}": value for key, value in options.items()},
        }
        base = prepare(load_config(None, given))
        found = sweep_on(
            base, points_of(base, ["modegpt"], fractions, options), LocalExecutor(), listener=nobody
        )
        dense = found["dense"]["perplexity"]
        for point in found["points"]:
            said = json.loads(
                Path(out, "points", point["name"], "allocation.json").read_text(encoding="utf-8")
            )
            points[name, point["asked"]] = {**point, "makers": said.get("makers", [])}
    return dense, points


def goals_of(points: Points, fractions: Sequence[float]) -> list[Goal]:
    """Return what was to be shown, of either way to measure damage."""
    goals = []
    for fraction in fractions:
        for alone, both in (("modegpt alone", "both"), tuple(CHOICES)[2:]):
            one, other = points[alone, fraction], points[both, fraction]
            goals.append(
                Goal(
                    text=f"{fraction}: {both}, not above {alone}",
                    measured=f"{other['perplexity']:.4f} against {one['perplexity']:.4f}",
                    met=other["perplexity"] <= one["perplexity"],
                )
            )
        kept = [points[name, fraction]["keep_fraction"] for name in CHOICES]
        goals.append(
            Goal(
                text=f"{fraction}: none above the target, at most {MAX_APART} apart",
                measured=f"{max(kept) - min(kept):.4f}",
                met=max(kept) - min(kept) <= MAX_APART and max(kept) <= fraction,
            )
        )
    return goals


def tables_of(dense: float, points: Points, fractions: Sequence[float]) -> dict[str, str]:
    """Return the tables of the result."""
    sizes, makers = [], []
    for fraction in fractions:
        for name in CHOICES:
            point = points[name, fraction]
            excess = point["perplexity"] - dense
            alone = points[name.replace("both", "modegpt alone"), fraction]["perplexity"] - dense
            sizes.append(
                (
                    f"{fraction}",
                    name,
                    f"{point['keep_fraction']:.4f}",
                    f"{point['parameters']:,}",
                    f"{point['perplexity']:.4f}",
                    f"{excess:.4f}",
                    f"{excess / alone - 1:+.1%}" if "both" in name else "",
                )
            )
            if point["makers"]:
                makers.append((f"{fraction}", name, *(_said(point, m) for m in MODULES)))
    columns = ("target", "choice", "kept", "parameters", "perplexity", "excess", "excess, change")
    return {
        f"`{MODEL}`, dense perplexity {dense:.4f}:": table(columns, sizes),
        "Layers in which each method shrinks a module:": table(
            ("target", "choice", *MODULES), makers
        ),
    }


def _said(point: Mapping[str, Any], module: str) -> str:
    count = Counter(layer.get(module, "whole") for layer in point["makers"])
    return ", ".join(f"{name} {number}" for name, number in sorted(count.items()))


def main() -> None:
    """Make every point and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one size on few sequences; writes nothing"
    )
    given = parser.parse_args()
    if not at_hand(MODEL):
        return
    load = load_average()
    fractions = FRACTIONS[1:2] if given.quick else FRACTIONS
    with tempfile.TemporaryDirectory(prefix="hull-of-methods-") as folder:
        dense, points = sweeps(folder, fractions=fractions, sequences=16 if given.quick else None)
    report(
        Result(
            claim="hull_of_methods",
            method=METHOD,
            configuration={
                "model": MODEL,
                "calibration": "256 sequences of 256 tokens",
                "evaluation": "128 sequences of 256 tokens",
                "threads": 1,
                "dtype": "float32",
                "executor": "LocalExecutor",
            },
            tables=tables_of(dense, points, fractions),
            goals=goals_of(points, fractions),
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    with_code_apart(main)
