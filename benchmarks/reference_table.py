"""SliceGPT as we do it reproduces what others computed from the same models and tokens.

Claim: with ``rotation=per_site`` and ``pca_on=residual``, dense perplexity is that of others to
four digits; nothing sliced changes no logit by more than 1e-4; the perplexity of the sliced model
is within 0.5 % of an independent implementation's on ``babyllama105``, and at most 0.5 % above the
published program's on ``llama-8m-ref``, at each slice.

Method: a whole run of the orchestrator for each model and slice, in this process, on the stored
tokens; perplexities and parameters are those of its report. The columns of others were made with
exactly these tokens: *published* is microsoft/TransformerCompression at 6b12cde (float32, float64
PCA of the residual before the norms, 1 % damping, ``final_orientation=pca``, widths rounded down
to a multiple of 8), *independent* a plain torch implementation of the same. *Sequential*: each PCA
sees the prefix already sliced. *Dense statistics*: all PCAs are of the dense model, as ours. The
published program subtracts the mean of each embedding row, which is wrong for Llama: on
``babyllama105`` it starts from a dense perplexity of 2.713 instead of 2.547, so there it is no
reference.

Needs the models and tokens in ``../shared``, which a fresh clone has not, and says so.

    .venv/bin/python benchmarks/reference_table.py [--quick]
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from result_file import Goal, Result, load_average, report, table
from trained import at_hand, nobody, stored, with_code_apart

TOLERANCE = 0.005  # of a perplexity
LOGIT_TOLERANCE = 1e-4
THREADS = 1
LOGIT_SEQUENCES = 8
METHOD = """\
A whole run of the orchestrator (calibrate, compress, stitch, verify, evaluate) in this process for
each model and slice: SliceGPT, `rotation=per_site`, `pca_on=residual`, `round_to=8`, all stored
calibration and evaluation sequences of 256 tokens, float32. Perplexity: non-overlapping sequences,
255 predictions each. *Published*: microsoft/TransformerCompression at 6b12cde, 1 % damping; it
subtracts the mean of each embedding row, which alone raises the dense perplexity of `babyllama105`
to 2.713. *Independent*: plain torch. All on the same models and tokens. *Dense statistics*: all
PCAs are of the dense model, as ours; *sequential*: each sees the prefix already sliced. Parameters:
distinct stored elements, an untied head included; *kept width* is that of the residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What others measured at one slice; None where they did not."""

    slice: float
    width: int
    parameters: int
    published: tuple[float, float]
    independent: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model and the numbers of others, each pair (sequential, dense statistics).

    Attributes:
        name: of its folder, and of its token files.
        hidden: dense width.
        parameters: distinct elements of the input checkpoint.
        dense: perplexity.
        points: the slices.
    """

    name: str
    hidden: int
    parameters: int
    dense: float
    points: tuple[Point, ...]


MODELS = (
    Model(
        name="babyllama105",
        hidden=128,
        parameters=936_448,
        dense=2.5470,
        points=(
            Point(
                slice=0.10,
                width=112,
                parameters=964_464,
                published=(2.8941, 2.9239),
                independent=(2.6925, 2.7017),
            ),
            Point(
                slice=0.20,
                width=96,
                parameters=821_216,
                published=(3.2446, 3.2950),
                independent=(2.9877, 3.0289),
            ),
            Point(
                slice=0.25,
                width=96,
                parameters=821_216,
                published=(3.2446, 3.2950),
                independent=(2.9877, 3.0289),
            ),
            Point(
                slice=0.30,
                width=88,
                parameters=751_320,
                published=(3.5700, 3.6369),
                independent=(3.2612, 3.3411),
            ),
        ),
    ),
    Model(
        name="llama-8m-ref",
        hidden=256,
        parameters=7_901_440,
        dense=48.7571,
        points=(
            Point(slice=0.10, width=224, parameters=7_873_024, published=(49.0676, 49.1458)),
            Point(slice=0.20, width=200, parameters=7_088_704, published=(49.6456, 49.6061)),
            Point(slice=0.25, width=192, parameters=6_831_104, published=(49.8837, 49.8776)),
            Point(slice=0.30, width=176, parameters=6_321_664, published=(50.5066, 50.5417)),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one run of ours gave."""

    dense: float
    compressed: float
    width: int
    before: int
    after: int
    logit_difference: float | None


def measure(model: Model, slice_: float, *, sequences: int | None) -> Measured:
    """Return the outcome of one run, which is made in a temporary directory and removed."""
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    with tempfile.TemporaryDirectory(prefix="reference-table-") as folder:
        given = load_config(
            None,
            {
                **stored(model.name, sequences=sequences),
                "out": f"{folder}/run",
                "method": "slicegpt",
                "slice": slice_,
                "options.rotation": "per_site",
                "options.pca_on": "residual",
                "options.round_to": 8,
                "threads": THREADS,
            },
        )
        prepared = prepare(given)
        open_run(prepared)
        found = run_on(prepared, LocalExecutor(), listener=nobody)
        difference = None
        if slice_ == 0.0:
            ids = torch.from_numpy(prepared.evaluation[:LOGIT_SEQUENCES])
            difference = _logit_difference(prepared.model_uri, f"{folder}/run/model", ids)
        return Measured(
            dense=found["evaluation"]["dense"]["perplexity"],
            compressed=found["evaluation"]["compressed"]["perplexity"],
            width=prepared.plan.form.layers[0].residual_in,
            before=found["parameters"]["before"],
            after=found["parameters"]["after"],
            logit_difference=difference,
        )


@torch.inference_mode()
def _logit_difference(dense: str, compressed: str, ids: torch.Tensor) -> float:
    """Return the largest difference of logits, both loaded as a user does."""
    from transformers import AutoModelForCausalLM

    logits = [
        AutoModelForCausalLM.from_pretrained(uri, trust_remote_code=ours).eval()(ids).logits
        for uri, ours in ((dense, False), (compressed, True))
    ]
    return float((logits[0] - logits[1]).abs().max())


def goals_of(model: Model, whole: Measured, found: dict[Point, Measured]) -> list[Goal]:
    """Return what was to be shown on one model."""
    assert whole.logit_difference is not None
    goals = [
        Goal(
            text=f"{model.name}: dense perplexity {model.dense:.4f} to four digits",
            measured=f"{whole.dense:.4f}",
            met=f"{whole.dense:.4g}" == f"{model.dense:.4g}",
        ),
        Goal(
            text=f"{model.name}: nothing sliced, logits within {LOGIT_TOLERANCE:g} of dense",
            measured=f"{whole.logit_difference:.1e}",
            met=whole.logit_difference <= LOGIT_TOLERANCE,
        ),
    ]
    for point, ours in found.items():
        if point.independent is not None:
            off = ours.compressed / point.independent[1] - 1
            text, met = "within 0.5 % of independent, dense statistics", abs(off) <= TOLERANCE
        else:
            off = ours.compressed / min(point.published) - 1
            text, met = "at most 0.5 % above the better published", off <= TOLERANCE
        where = f"{model.name}, slice {point.slice:.2f}"
        goals.append(Goal(text=f"{where}: {text}", measured=f"{off:+.3%}", met=met))
    goals.append(
        Goal(
            text=f"{model.name}: kept widths and parameters as published",
            measured="equal" if _same_sizes(found) else "different",
            met=_same_sizes(found),
        )
    )
    return goals


def _same_sizes(found: dict[Point, Measured]) -> bool:
    return all(
        (ours.width, ours.after) == (point.width, point.parameters) for point, ours in found.items()
    )


def rows_of(model: Model, whole: Measured, found: dict[Point, Measured]) -> list[Sequence[str]]:
    """Return the lines of one model: ours, and others with our distance from them."""
    none = ("",) * 4
    rows: list[Sequence[str]] = [
        (
            "dense",
            str(model.hidden),
            f"{whole.dense:.4f}",
            f"{whole.before:,}",
            f"{model.dense:.4f} ({whole.dense / model.dense - 1:+.2%})",
            *none,
        ),
        ("0.00", str(whole.width), f"{whole.compressed:.4f}", f"{whole.after:,}", "", *none),
    ]
    for point, ours in found.items():
        independent = point.independent or (None, None)
        others = (*reversed(independent), *reversed(point.published))
        rows.append(
            (
                f"{point.slice:.2f}",
                str(ours.width),
                f"{ours.compressed:.4f}",
                f"{ours.after:,}",
                "",
                *(_beside(other, ours.compressed) for other in others),
            )
        )
    return rows


def _beside(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else f"{theirs:.4f} ({ours / theirs - 1:+.2%})"


COLUMNS = (
    "slice",
    "kept width",
    "ours",
    "parameters",
    "dense, by others",
    "independent, dense statistics",
    "independent, sequential",
    "published, dense statistics",
    "published, sequential",
)


def main() -> None:
    """Run every point and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one point on few sequences; writes nothing"
    )
    given = parser.parse_args()
    if not at_hand(*(model.name for model in MODELS)):
        return
    load = load_average()
    tables, goals = {}, []
    for model in MODELS[:1] if given.quick else MODELS:
        sequences = 8 if given.quick else None
        points = model.points[:1] if given.quick else model.points
        whole = measure(model, 0.0, sequences=sequences)
        found = {point: measure(model, point.slice, sequences=sequences) for point in points}
        title = f"`{model.name}`: perplexity, that of others with our distance from it:"
        tables[title] = table(COLUMNS, rows_of(model, whole, found))
        goals += goals_of(model, whole, found)
    report(
        Result(
            claim="reference_table",
            method=METHOD,
            configuration={
                "method": "slicegpt, rotation per_site, pca_on residual, round_to 8, "
                "slice_head false",
                "calibration": "babyllama105 256, llama-8m-ref 128 sequences of 256 tokens",
                "evaluation": "babyllama105 128, llama-8m-ref 96 sequences of 256 tokens",
                "microbatch": "4096 tokens",
                "threads": THREADS,
                "dtype": "float32",
                "executor": "LocalExecutor",
            },
            tables=tables,
            goals=goals,
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    with_code_apart(main)
