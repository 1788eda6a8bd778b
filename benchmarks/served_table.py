"""What a checkpoint that stock engines load costs, beside widths that are free.

Claim: the damage that the hull predicts orders the constraints as perplexity does; multiples of 8
cost little beside the finest steps; on a real model a stock checkpoint costs little, and
``servable=auto`` takes it there.

Method: whole runs of MoDeGPT by measured damage at equal true size, one a row, in this process:
widths in the finest steps, in multiples of 8, FFN widths by layer alone (what ``export --format
deci`` takes), one FFN width (``native``), narrower heads (``narrow_heads``), and ``auto``. The
first run of a model calibrates; the others take its statistics. Models: the trained toy of
``../shared``, and SmolLM2 as ``real_models.py`` makes it; a model that is not here is left out.

    .venv/bin/python benchmarks/served_table.py [--real FOLDER] [--only toy|real]
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_models import real
from real_table import Row, measure
from result_file import Goal, Result, load_average, report, table
from trained import at_hand, stored, with_code_apart

TOY = "babyllama105"
CASES = (("toy", 0.8), ("toy", 0.7), ("real", 0.8))
METHOD = """\
A whole run of the orchestrator for each row, in this process, on one thread of the CPU;
`allocation=marginal` and other defaults but for those named. Perplexity on the stored evaluation
tokens. Damage: the sum over layers and modules that the measured curves predict for the widths;
`native` alone measures nothing, so its damage is that which the run with `auto` compared. Kept:
true parameters over those of the input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of one row.

    Attributes:
        row: its name.
        perplexity: of the result, and of the input.
        kept: true fraction of the parameters.
        served: the constraint under which the widths were chosen.
        damages: constraint -> predicted damage.
        heads: widths of q/k and of v/o heads in the first layer.
    """

    row: str
    perplexity: tuple[float, float]
    kept: float
    served: str
    damages: Mapping[str, float]
    heads: tuple[int, int]


def rows(case: str) -> list[Row]:
    """Return what is measured on a model; the first row makes the statistics of all."""
    # The heads of the toy have 16 channels: with multiples of 8 they could only be halved.
    fine = {"multiple_of": "1"}
    eights = {"multiple_of": "8"}
    own = fine if case == "toy" else {}
    deci = {
        "servable": "remote",
        "modules": "mlp",
        "multiple_of": "256" if case == "real" else "32",
    }
    named = {
        "auto": {"servable": "auto", **own},
        "finest": {"servable": "remote", **fine},
        "multiples of 8": {"servable": "remote", **eights},
        "FFN by layer (deci)": deci,
        "narrow_heads": {"servable": "narrow_heads", **own},
        "native": {"servable": "native", **own},
    }
    return [Row(name=name, method="modegpt", options=options) for name, options in named.items()]


def found(case: str, keep_fraction: float, keys: Mapping[str, Any], work: Path) -> Iterator[Found]:
    """Yield the result of each row; all but the first take the statistics of the first."""
    base = ""
    for number, row in enumerate(rows(case)):
        run = work / f"{case}-{keep_fraction}-{number}"
        given = {**keys, "keep_statistics": True} if not base else {**keys, "stats": base}
        got = measure(row, given, run, keep_fraction=keep_fraction)
        base = base or str(run)
        said = got["method"]["served"]
        evaluation = got["evaluation"]
        pair = tuple(float(evaluation[w]["perplexity"]) for w in ("compressed", "dense"))
        yield Found(
            row=row.name,
            perplexity=(pair[0], pair[1]),
            kept=float(got["parameters"]["keep_fraction"]),
            served=said.get("as") or "native",
            damages=said.get("damages") or {},
            heads=_heads(run),
        )
        print(case, keep_fraction, row.name, f"{pair[0]:.3f}", said, flush=True)


def _heads(run: Path) -> tuple[int, int]:
    config = json.loads((run / "model" / "config.json").read_text())
    if "layer_forms" in config:
        first = config["layer_forms"][0]
        return first["qk_head_dim"], first["vo_head_dim"]
    return config["head_dim"], config["head_dim"]


def damage_of(each: Found, auto: Found) -> float | None:
    """Return the predicted damage of a row; that of ``native`` is what ``auto`` compared."""
    if each.row == "native":
        return auto.damages.get("native")
    return each.damages.get(each.served)


def goal(case: str, keep_fraction: float, results: Sequence[Found]) -> Goal:
    """Return whether damage and perplexity put the rows in the same order."""
    auto = next(each for each in results if each.row == "auto")
    scored = [(damage_of(each, auto), each) for each in results if each.row != "auto"]
    known = [(damage, each) for damage, each in scored if damage is not None]
    by_damage = [each.row for _, each in sorted(known, key=lambda pair: pair[0])]
    by_loss = [each.row for _, each in sorted(known, key=lambda pair: pair[1].perplexity[0])]
    return Goal(
        text=f"{case} at {keep_fraction}: predicted damage has the order of perplexity",
        measured=f"by damage: {', '.join(by_damage)}; by perplexity: {', '.join(by_loss)}; "
        f"auto chose {auto.served}",
        met=by_damage == by_loss,
    )


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", type=Path)
    parser.add_argument("--only", choices=("toy", "real"))
    parser.add_argument("--quick", action="store_true", help="few sequences, no result file")
    given = parser.parse_args()
    load = load_average()
    cases = {}
    if given.only != "real" and at_hand(TOY):
        cases["toy"] = stored(TOY, sequences=8 if given.quick else None)
    if given.only != "toy" and given.real:
        keys = real(given.real)
        cases |= {} if keys is None else {"real": keys}
    all_found: list[tuple[str, float, list[Found]]] = []
    with tempfile.TemporaryDirectory() as work:
        for case, keep_fraction in CASES:
            if case in cases:
                results = list(found(case, keep_fraction, cases[case], Path(work)))
                all_found.append((case, keep_fraction, results))
    lines = [
        [case, f"{keep_fraction}", each.row, each.served, f"{each.perplexity[0]:.3f}",
         f"{each.perplexity[1]:.3f}", f"{each.kept:.4f}", f"{each.heads[0]}/{each.heads[1]}",
         "" if (d := damage_of(each, results[0])) is None else f"{d:.4f}"]
        for case, keep_fraction, results in all_found
        for each in results
    ]  # fmt: skip
    heads = ["model", "asked", "row", "served as", "perplexity", "dense", "kept",
             "q/k and v/o heads", "predicted damage"]  # fmt: skip
    options = {
        f"{case}: {row.name}": ", ".join(f"{k}={v}" for k, v in row.options.items())
        for case in cases
        for row in rows(case)
    }
    report(
        Result(
            claim="served_table",
            method=METHOD,
            configuration={"models": ", ".join(cases), "threads": 1, **options},
            tables={"MoDeGPT by constraint:": table(heads, lines)},
            goals=[goal(*each) for each in all_found],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    with_code_apart(main)
