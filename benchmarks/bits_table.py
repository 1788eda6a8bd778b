"""Bits, groups and widths in one hull: perplexity against bytes, beside uniform quantisation.

Claims, on a trained toy (`babyllama105`; bytes are nominal: what is not quantised at 16 bits, no
filling): GPTQ from the statistics of the dense model reaches 2.60 at 4 bits in groups of 32, 2.79
at 3 bits and 2.549 at 8, and rounding layer after layer is not better by more than 0.5 %; the
corrected pass reaches 2.69 at 3 bits; the hull over widths, bits and groups reaches 2.65 at the
bytes of 3 bits, 2.60 with the corrected pass, 2.74 at 400,000 bytes, and is below uniform
quantisation at the bytes of each of five schemes.

On a real model (``--real``: SmolLM2-135M-Instruct, WikiText-2, stored bytes): GPTQ reaches 43 at 3
bits in groups of 64, 34.7 with the corrected pass, 29.1 at 4 bits; the rest is shown, in a figure.

Method: a whole run of the orchestrator for each row, in this process; all rows share the statistics
of the first one. Rows are kept in ``--folder``, so that the same command resumes.

    .venv/bin/python benchmarks/bits_table.py [--real] [--folder DIR] [--only ROW ...] [--quick]
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from real_models import OUT, real
from result_file import RESULTS, Goal, Result, load_average, report, table
from trained import SHARED, at_hand, nobody, stored, with_code_apart

from orchestrator.report.pareto import front
from planners.model.cost import matrices
from planners.model.form import model_form_from_json
from planners.model.scheme import nominal_bits
from planners.plan import run_plan_from_json

TOY = "babyllama105"
UNIFORM = {"8/128": 2.549, "5/32": 0.0, "4/32": 2.60, "4/128": 0.0, "3/32": 2.79, "3/128": 0.0}
SHAPES = 16  # bytes of the stored shape of a matrix, which a nominal count leaves out
SEQUENTIAL_GAIN = 0.005
REAL_SEQUENCES = 32
CSS = "../../orchestrator/report/page.css"  # of the figure's page, from `RESULTS`
ONE = {"cpu": 1, "cuda": 1}  # speeds are of no interest here, and of one prompt only
METHOD = """\
A whole run of the orchestrator (calibrate, allocate, compress, second pass, stitch, evaluate,
verify) in this process for each row, with `dtype: bfloat16`; losses are measured in float32.
Nominal bytes: the integers, scales of 16 bits, and all else at 16 bits; stored bytes are those of
the tensors in the files. `sequential` rounds layer after layer on the inputs that the rounded
layers leave, without any correction: the second pass with its corrections replaced by zero, taken
whatever its loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result that is measured.

    Attributes:
        name: of its row.
        kind: of the line of the figure that it is on.
        keys: of the recipe.
        sequential: corrections are replaced by zero.
    """

    name: str
    kind: str
    keys: Mapping[str, Any]
    sequential: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with its rows; the first one's statistics serve all."""

    claim: str
    rows: Sequence[Row]
    goals: Mapping[str, float]  # row -> the most its perplexity may be
    below: Mapping[str, str] = field(default_factory=dict)  # row -> a row that it is to be below


def _gptq(scheme: str, kind: str = "uniform", **options: Any) -> Row:
    bits, group = scheme.split("/")
    own = {"bits": int(bits), "group": int(group), "uneven": "smaller", **options}
    name = " ".join([kind, scheme])
    return Row(
        name=name,
        kind=kind,
        keys={"method": "gptq", **{f"options.{key}": value for key, value in own.items()}},
        sequential=kind == "sequential",
    )


def _hull(bytes_: int, kind: str, *, matrices_: int, **keys: Any) -> Row:
    size = f"{(bytes_ + SHAPES * matrices_) / 1e3:.3f}kB"
    return Row(name=f"{kind} {bytes_}", kind=kind, keys={"keep_bytes": size, **keys})


def toy() -> Case:
    """Return the rows of the toy; the bytes of uniform schemes are those of its own count."""
    sizes = {"5/32": 663296, "4/32": 548096, "4/128": 515456, "3/32": 432896, "3/128": 400256}
    bits, widths = "hull of bits", "hull"
    corrected = {"options.refit": True}
    rows = [_hull(432896, widths, matrices_=35, method="modegpt")]
    rows += [_gptq(scheme) for scheme in UNIFORM]
    rows += [_gptq(scheme, "nearest", rounding="nearest") for scheme in ("4/32", "3/32")]
    rows += [_gptq("3/32", "sequential", refit=True)]
    rows += [_gptq(scheme, "corrected", refit=True) for scheme in ("4/32", "3/32")]
    rows += [_hull(n, bits, matrices_=35, method="gptq") for n in sizes.values()]
    others = [n for n in (*sizes.values(), 400000) if n != sizes["3/32"]]
    rows += [_hull(n, widths, matrices_=35, method="modegpt") for n in others]
    rows += [
        _hull(n, "hull, corrected", matrices_=35, method="modegpt", **corrected)
        for n in (432896, 400000)
    ]
    goals = {f"uniform {scheme}": most for scheme, most in UNIFORM.items() if most}
    goals |= {"corrected 3/32": 2.69, "hull 432896": 2.65, "hull 400000": 2.74}
    goals |= {"hull, corrected 432896": 2.60}
    below = {f"hull {n}": f"uniform {scheme}" for scheme, n in sizes.items()}
    return Case(claim="bits_table", rows=rows, goals=goals, below=below)


def smollm2() -> Case:
    """Return the rows of the real model: stored bytes, so that a loader sees what is counted."""
    three, four = 99_800_000, 113_100_000  # nominal bytes of 3 and 4 bits in groups of 64
    then_rounded = {"bits": 4, "group": 64, "uneven": "smaller"}
    steps = [
        {"method": "modegpt", "keep_fraction": 0.9, "options": {"multiple_of": 64}},
        {"method": "gptq", "options": then_rounded},
    ]
    rows = [_gptq(scheme) for scheme in ("3/64", "4/64")]
    rows += [_gptq("3/64", "corrected", refit=True)]
    rows += [Row(name="modegpt 0.9, then 4/64", kind="cut, then 4 bits", keys={"steps": steps})]
    rows += [_gptq("3/64", "nearest", rounding="nearest"), _gptq("8/64")]
    for kind, own in (("hull", {}), ("hull, corrected", {"options.refit": True})):
        rows += [_hull(n, kind, matrices_=210, method="modegpt", **own) for n in (three, four)]
    goals = {"uniform 3/64": 43.0, "corrected 3/64": 34.7, "uniform 4/64": 29.1}
    return Case(claim="bits_table_real", rows=rows, goals=goals)


def measure(row: Row, keys: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return what is said of a row's run in that directory, made or resumed."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    prepared = prepare(load_config(None, {**keys, **row.keys, "out": str(run)}))
    open_run(prepared)
    with ExitStack() as patches:
        one_prompt = patch.multiple("orchestrator.phases.throughput", BATCHES=(1,), RUN_MOST=ONE)
        patches.enter_context(one_prompt)
        if row.sequential:
            step = "actors.layer_units.corrected_rounding.least_squares_step"
            patches.enter_context(patch(step, _no_step))
            units = "actors.layer_units.registry.FUNCTIONS"
            patches.enter_context(patch.dict(units, refit_losses=_always_used))
        found = run_on(prepared, LocalExecutor(), listener=nobody)
    plan = run_plan_from_json(json.loads((run / "plan.json").read_text())["plan"])
    form, path = plan.form, run / "allocation.json"
    if path.is_file():
        form = model_form_from_json(json.loads(path.read_text())["form"])
    nominal = sum(
        nominal_bits(layer.schemes[name], *dims)
        if name in layer.schemes
        else 16 * dims[0] * dims[1]
        for layer in form.layers
        for name, dims in matrices(plan.shape, layer).items()
    )
    linears = sum(
        dims[0] * dims[1] for layer in form.layers for dims in matrices(plan.shape, layer).values()
    )
    rest = found["parameters"]["after"] - linears
    index = json.loads((run / "model/model.safetensors.index.json").read_text())
    return {
        "device": torch.cuda.get_device_name() if keys["device"] == "cuda" else "CPU",
        "perplexity": found["evaluation"]["compressed"]["perplexity"],
        "dense": found["evaluation"]["dense"]["perplexity"],
        "nominal": nominal // 8 + _rest_bytes(plan.shape, form, rest),
        "stored": index["metadata"]["total_size"],
        "seconds": found["seconds"],
        "kept": found["parameters"]["keep_fraction"],
        "tables": {name: f"{s.bits}/{s.group}" for name, s in form.tables.items()},
    }


def _rest_bytes(shape: Any, form: Any, rest: int) -> int:
    """Return the nominal bytes of all but the linears of the layers."""
    width = shape.hidden
    total = 0
    for scheme in form.tables.values():
        rest -= shape.vocab_size * width
        total += nominal_bits(scheme, shape.vocab_size, width) // 8
    return total + 2 * rest


def _no_step(sums: Any, *, damping: float, where: str) -> tuple[torch.Tensor, str]:
    del damping, where
    return torch.zeros_like(sums.cross), "none"


def _always_used(*arguments: Any) -> Any:
    """Return the losses of a second pass, whose layers are taken though its drafts are better."""
    from actors.layer_units import refit

    files, values = refit.losses(*arguments)
    return files, {**values, "used": True}


def kept_or_measured(row: Row, keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what is known of a row, from its file if an earlier call of this script made it."""
    path = folder / f"{row.name.replace('/', '-').replace(' ', '_')}.json"
    if not path.is_file():
        run = folder / path.stem
        found = measure(row, keys, run)
        if "stats" in keys:  # the first row keeps its own for the others
            shutil.rmtree(run)
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"{row.name}: {found['perplexity']:.4f}, {found['nominal']:,} nominal bytes", flush=True)
    return dict(found)


def goals_of(case: Case, found: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Return what was to be shown, of the rows that are there."""
    goals = [
        Goal(
            text=f"{name}: at most {most}",
            measured=f"{found[name]['perplexity']:.4f} at {found[name]['nominal']:,} bytes",
            met=found[name]["perplexity"] <= most,
        )
        for name, most in case.goals.items()
        if name in found
    ]
    goals += [
        Goal(
            text=f"{name}: below {other}, and not larger",
            measured=f"{found[name]['perplexity']:.4f} and {found[other]['perplexity']:.4f}, "
            f"{found[name]['nominal']:,} and {found[other]['nominal']:,} bytes",
            met=found[name]["perplexity"] < found[other]["perplexity"]
            and found[name]["nominal"] <= found[other]["nominal"],
        )
        for name, other in case.below.items()
        if {name, other} <= found.keys()
    ]
    if "sequential 3/32" in found:
        one, other = (found[f"{kind} 3/32"]["perplexity"] for kind in ("uniform", "sequential"))
        goals.append(
            Goal(
                text=f"sequential no better than from dense statistics by {SEQUENTIAL_GAIN:.1%}",
                measured=f"{other:.4f} and {one:.4f}",
                met=other >= one * (1 - SEQUENTIAL_GAIN),
            )
        )
    return goals


def table_of(case: Case, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows as Markdown, by their bytes within each kind."""
    dense = next(iter(found.values()))["dense"]
    lines = [("dense", f"{dense:.4f}", *[""] * 6)]
    for row in case.rows:
        if row.name not in found:
            continue
        one = found[row.name]
        lines.append((
            row.name, f"{one['perplexity']:.4f}", f"{one['nominal']:,}", f"{one['stored']:,}",
            f"{one['kept']:.3f}", ", ".join(f"{k} {v}" for k, v in one["tables"].items()) or "-",
            one["device"], f"{one['seconds']['total']:.0f}",
        ))  # fmt: skip
    columns = (
        "row",
        "perplexity",
        "nominal bytes",
        "stored bytes",
        "kept",
        "tables",
        "on",
        "seconds",
    )
    return table(columns, lines)


def figure_of(case: Case, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a page with perplexity over stored bytes, one line for each kind of row."""
    points = []
    for row in (row for row in case.rows if row.name in found):
        one = found[row.name]
        least = min(o["perplexity"] for o in found.values() if o["stored"] <= one["stored"])
        points.append({
            "name": row.name, "line": row.kind, "bytes": one["stored"],
            "perplexity": one["perplexity"], "on_front": one["perplexity"] == least,
        })  # fmt: skip
    plot = front(points, dense=next(iter(found.values()))["dense"], over="bytes")
    legend = "".join(
        f'<li><span class="swatch {shape}" style="--swatch:{colour}"></span>{name}</li>'
        for name, colour, shape in plot.words.legend
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Perplexity over bytes</title>"
        f"<link rel='stylesheet' href='{CSS}'><body><main><figure><h3>{plot.words.title}</h3>"
        f"<figcaption>{plot.words.caption}</figcaption><ul class='legend'>{legend}</ul>"
        f"<div class='plot'><div class='wide'>{plot.wide}</div></div></figure></main></body>\n"
    )


def _said(value: Any) -> Any:
    """Return a value of the recipe without the place of this checkout."""
    if not isinstance(value, str):
        return value
    return value.replace(str(SHARED), "../shared").replace(str(OUT), "benchmarks/.real")


def main() -> None:
    """Make every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--real", action="store_true", help="SmolLM2 in place of the toy")
    parser.add_argument("--folder", type=Path, help="where rows are kept [a temporary folder]")
    parser.add_argument("--only", nargs="+", help="make these rows, and no table")
    parser.add_argument("--threads", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", type=Path, default=OUT, help="folder of real_models.py")
    parser.add_argument("--quick", action="store_true", help="few sequences; writes nothing")
    given = parser.parse_args()
    case = smollm2() if given.real else toy()
    keys = real(given.models) if given.real else (stored(TOY) if at_hand(TOY) else None)
    if keys is None:
        return
    if given.quick:
        keys |= {f"{use}.sequences": 4 for use in ("calibration", "evaluation")}
    keys |= {"dtype": "bfloat16", "threads": given.threads, "device": given.device}
    keys |= {"calibration_dtype": "float32"}
    if given.real:  # those of the reference
        keys["calibration.sequences"] = keys.get("calibration.sequences") or REAL_SEQUENCES
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="bits-table-") as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        first = case.rows[0]
        kept_or_measured(first, {**keys, "keep_statistics": True}, folder)
        keys["stats"] = str(folder / first.name.replace("/", "-").replace(" ", "_"))
        rows = [r for r in case.rows if not given.only or r.name in given.only]
        found = {row.name: kept_or_measured(row, keys, folder) for row in rows}
        if given.only:
            return
        report(
            Result(
                claim=case.claim,
                method=METHOD,
                configuration={
                    **{key: _said(value) for key, value in keys.items() if key != "stats"},
                    **{row.name: dict(row.keys) for row in case.rows},
                },
                tables={"By bytes:": table_of(case, found)},
                goals=goals_of(case, found),
                load=load,
            ),
            keep=not given.quick,
        )
        if given.real and not given.quick:
            page = figure_of(case, found)
            (RESULTS / f"{case.claim}.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    with_code_apart(main)
