"""Recovery: perplexity before and after training on the calibration data, beside the bars.

Claims, on a trained toy (`babyllama105`, dense 2.5470; one epoch of its 65,536 calibration tokens,
32 steps, rates by trial): `global` takes MoDeGPT with 0.2 removed to 2.93, with 0.1 to 2.68,
SliceGPT at width 88 to 3.04 and low rank in layers 1 and 4 to 2.96; without the dense model, from
labels alone, it is worse. `local` takes that low rank to 3.09. Behind measured widths and the
second pass neither does harm, and at keep 0.7 a fifth of the excess perplexity is gone. Workers,
and the loss of one, change neither the bytes of `local` nor the text that a model writes itself.

Method: a whole run of the orchestrator for each row, in this process. Rows are kept in
``--folder``, so that the same command resumes.

    .venv/bin/python benchmarks/recover_table.py [--folder DIR] [--only ROW ...] [--quick]
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from result_file import Goal, Result, load_average, report, table
from trained import SHARED, at_hand, stored, with_code_apart

from actors.methods import svdllm
from actors.storage.tokens import tokens_from_parquet, tokens_hash
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.backend.local import LocalExecutor
from orchestrator.recipe import presets
from orchestrator.rundir.layout import RECOVERY_TOKENS
from planners.model.form import ModelForm

TOY = "babyllama105"
SPEC = svdllm.SPEC  # before it is patched
RANK, LAYERS = 38, (1, 4)  # of the low rank that is made by hand
UNIFORM = {"method": "modegpt", "options.allocation": "uniform"}
BY_HAND = "low rank"
CUTS: dict[str, dict[str, Any]] = {
    "MoDeGPT 0.2": {**UNIFORM, "keep_fraction": 0.8},
    "MoDeGPT 0.1": {**UNIFORM, "keep_fraction": 0.9},
    "SliceGPT 88": {"method": "slicegpt", "slice": 0.30},
    BY_HAND: {"method": "svdllm", "keep_fraction": 0.8},
    "marginal, refit 0.2": {"method": "modegpt", "options.refit": True, "keep_fraction": 0.8},
    "marginal, refit 0.3": {"method": "modegpt", "options.refit": True, "keep_fraction": 0.7},
}
BARS = {
    "MoDeGPT 0.2, global": 2.93,
    "MoDeGPT 0.1, global": 2.68,
    "SliceGPT 88, global": 3.04,
    "low rank, global": 2.96,
    "low rank, local": 3.09,
}
HARM, GONE = 0.02, 0.2  # perplexity above the start, share of the excess
SAVE_STEPS, LOST_STEP, LOST_TOKEN = 16, 40, 100  # a layer takes 48 to 64 steps, a part 240 tokens
ONE = {"cpu": 1, "cuda": 1}  # speeds are of no interest here, and of one prompt only
METHOD = f"""\
A whole run of the orchestrator (calibrate, allocate, compress, recover, evaluate, verify) in this
process for each row, one thread, float32, everything at its default but what the table says: rates
0.01, 0.003, 0.001 and 0.0003 relative to the root mean square of each tensor, each tried for 8
steps until one is worse than the one before, then 32 steps of 8 x 256 tokens, trained is what the
cut made, 16 of the 256 calibration sequences are held out. *Low rank*: SVD-LLM with rank {RANK} for
all seven linears of layers 1 and 4, set by hand, as the program chooses ranks by a share. *rft*:
the recover settings of the preset `slicegpt-rft` but for its data, batch and tokens. Perplexities
are of the evaluation file, by the checkpoint that a user loads; held-out ones are of the 16
sequences. Seconds are of the phase, trials included, of one process beside another one on two
cores. *Lost*: of two workers one is lost, in the middle of a
layer {SAVE_STEPS} steps behind a checkpoint or less, or in the middle of a part of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result that is measured.

    Attributes:
        cut: of `CUTS`.
        way: how it is trained, for people.
        recover: keys of the recipe's section; none where it is not.
        workers: how many.
        loses: ``step`` or ``generate``, in which a worker is lost.
    """

    cut: str
    way: str
    recover: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    loses: str = ""

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.cut}, {self.way}"


def rows() -> list[Row]:
    """Return all rows, each cut first as it was cut."""
    local, whole = {"mode": "local"}, {"mode": "global"}
    own = {**whole, "data": "self"}
    found = []
    for cut in CUTS:
        found += [Row(cut=cut, way="as cut"), Row(cut=cut, way="global", recover=whole)]
        if cut != "MoDeGPT 0.1":
            found.append(Row(cut=cut, way="local", recover=local))
    saved = {**local, "save_steps": SAVE_STEPS}
    one, sliced = "MoDeGPT 0.2", "SliceGPT 88"
    found += [
        Row(cut=one, way="global, labels", recover={**whole, "loss": "labels"}),
        Row(cut=sliced, way="rft", recover=rft()),
        Row(cut=sliced, way="global, lora", recover={**whole, "trains": "lora"}),
        *(Row(cut=one, way=f"local, {n} workers", recover=local, workers=n) for n in (2, 3)),
        Row(cut=one, way="local, one lost", recover=saved, workers=2, loses="step"),
        Row(cut=one, way="global, self", recover=own),
        Row(cut=one, way="global, self, 2 workers", recover=own, workers=2),
        Row(cut=one, way="global, self, one lost", recover=own, workers=2, loses="generate"),
    ]
    return found


def rft() -> dict[str, Any]:
    """Return how the preset trains, but for its data."""
    found = dict(yaml.safe_load(presets.text("slicegpt-rft"))["recover"])
    for key in ("data", "tokens", "batch"):
        del found[key]
    return found


def low_rank_form(*arguments: Any) -> ModelForm:
    """Return the form of SVD-LLM with the ranks that were set by hand."""
    form = SPEC.form(*arguments)
    ranks = [layer.ranks if index in LAYERS else () for index, layer in enumerate(form.layers)]
    layers = [
        replace(layer, ranks=dict.fromkeys(own, RANK))
        for layer, own in zip(form.layers, ranks, strict=True)
    ]
    return replace(form, layers=tuple(layers))


class Losing(LocalExecutor):
    """Loses the worker of one of all calls that continue a text, once."""

    def __init__(self) -> None:
        self._count = 0
        self._gone: Any = None

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Run the call, unless its worker is gone."""
        self._count += method == "generate"
        if self._gone is None and self._count == LOST_TOKEN:
            self._gone = handle
        if handle is self._gone:
            handle, method, args = _Gone(), "call", ()
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


class _Gone:
    def call(self) -> None:
        raise WorkerLost(FailureClass.WORKER_CRASHED, "lost by the benchmark")


def _losing_a_step() -> Any:
    """Return a patch with which one step of a training loses its worker."""
    from actors.training.steps import Steps

    taken, step = [], Steps.step

    def lost_once(self: Steps, gradients: Any, rate: float) -> None:
        taken.append(rate)
        if len(taken) == LOST_STEP:
            raise WorkerLost(FailureClass.WORKER_CRASHED, "lost by the benchmark")
        step(self, gradients, rate)

    return patch.object(Steps, "step", lost_once)


def measure(
    row: Row,
    keys: Mapping[str, Any],
    run: Path,
    *,
    cuts: Mapping[str, Mapping[str, Any]] = CUTS,
) -> dict[str, Any]:
    """Return what is said of a row's run in that directory, made or resumed."""
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run_on

    how = {f"recover.{key}": value for key, value in row.recover.items()}
    given = {**keys, **cuts[row.cut], **how, "workers": row.workers, "out": str(run)}
    lost: list[str] = []

    def listener(event: Mapping[str, Any]) -> None:
        if event["kind"] == FailureClass.WORKER_CRASHED:
            lost.append(str(event.get("unit", "")))

    with ExitStack() as patches:
        one_prompt = patch.multiple("orchestrator.phases.throughput", BATCHES=(1,), RUN_MOST=ONE)
        patches.enter_context(one_prompt)
        if row.cut == BY_HAND:
            by_hand = replace(SPEC, form=low_rank_form)
            patches.enter_context(patch.object(svdllm, "SPEC", by_hand))
        prepared = prepare(load_config(None, given))
        open_run(prepared)
        if row.loses == "step":
            patches.enter_context(_losing_a_step())
        executor = Losing() if row.loses == "generate" else LocalExecutor()
        found = run_on(prepared, executor, listener=listener)
    weights = hashlib.sha256()
    for path in sorted((run / "model").glob("*.safetensors")):
        weights.update(path.read_bytes())
    text = run / RECOVERY_TOKENS
    recovery = found.get("recovery") or {}
    return {
        "perplexity": found["evaluation"]["compressed"]["perplexity"],
        "dense": found["evaluation"]["dense"]["perplexity"],
        "kept": found["parameters"]["keep_fraction"],
        "seconds": found["seconds"],
        "weights": weights.hexdigest(),
        "text": tokens_hash(tokens_from_parquet(text.read_bytes())) if text.exists() else "",
        "recovery": {k: v for k, v in recovery.items() if k not in ("curve",)},
        "lost": lost,
        "verified": found["verify"]["passed"],
    }


def kept_or_measured(row: Row, keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what is known of a row, from its file if an earlier call of this script made it."""
    path = folder / f"{row.name.replace(' ', '_').replace(',', '')}.json"
    if not path.is_file():
        found = measure(row, keys, folder / path.stem)
        shutil.rmtree(folder / path.stem)
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"{row.name}: {found['perplexity']:.4f}, {found['seconds']['total']:.0f} s", flush=True)
    return dict(found)


Found = Mapping[str, Mapping[str, Any]]


def _perplexity(found: Found, name: str) -> float:
    return float(found[name]["perplexity"])


def goals_of(found: Found) -> list[Goal]:
    """Return what was to be shown."""
    goals = [
        Goal(
            text=f"{name}: at most {most}",
            measured=f"{_perplexity(found, name):.4f}{_how(found[name])}",
            met=_perplexity(found, name) <= most,
        )
        for name, most in BARS.items()
    ]
    labels, kl = (f"MoDeGPT 0.2, {way}" for way in ("global, labels", "global"))
    goals.append(
        Goal(
            text="labels alone are worse than the dense model's logits",
            measured=f"{_perplexity(found, labels):.4f} and {_perplexity(found, kl):.4f}",
            met=_perplexity(found, labels) > _perplexity(found, kl),
        )
    )
    risen = {
        row.name: _perplexity(found, row.name) - _perplexity(found, f"{row.cut}, as cut")
        for row in rows()
        if row.recover
    }
    worst = max(risen, key=lambda name: risen[name])
    goals.append(
        Goal(
            text=f"no row ends more than {HARM} above its start",
            measured=f"{risen[worst]:+.4f}, {worst}",
            met=risen[worst] <= HARM,
        )
    )
    share = _gone(found, "marginal, refit 0.3", "global")
    goals.append(
        Goal(
            text=f"marginal with refit at keep 0.7: {GONE:.0%} of the excess perplexity gone",
            measured=f"{share:.1%} by global, "
            f"{_gone(found, 'marginal, refit 0.3', 'local'):.1%} by local",
            met=share >= GONE,
        )
    )
    return [*goals, *_same(found)]


def _same(found: Found) -> list[Goal]:
    """Return the goals of rows that are to have the same bytes as others."""
    goals = []
    for way, ends, of in (
        ("local", ("", ", 2 workers", ", 3 workers", ", one lost"), "weights"),
        ("global, self", ("", ", 2 workers", ", one lost"), "text"),
        ("global, self", ("", ", 2 workers", ", one lost"), "weights"),
    ):
        names = [f"MoDeGPT 0.2, {way}{end}" for end in ends]
        hashes = [found[name][of][:12] for name in names]
        losses = found[names[-1]]["lost"]
        goals.append(
            Goal(
                text=f"{way}: the same {of} from 1, 2{', 3' if len(ends) > 3 else ''} "  # noqa: PLR2004
                "workers and after a loss",
                measured=f"{', '.join(dict.fromkeys(hashes))}; {len(losses)} lost: {losses[:1]}",
                met=len(set(hashes)) == 1 and bool(losses),
            )
        )
    return goals


def _gone(found: Found, cut: str, way: str) -> float:
    """Return the share of the perplexity above that of the dense model that a way takes away."""
    start = _perplexity(found, f"{cut}, as cut")
    return (start - _perplexity(found, f"{cut}, {way}")) / (
        start - found[f"{cut}, as cut"]["dense"]
    )


def _how(one: Mapping[str, Any]) -> str:
    return f" at rate {rate_of(one['recovery'])} in {one['recovery']['steps']} steps"


def rate_of(recovery: Mapping[str, Any]) -> str:
    """Return the rate that was chosen, or those of the layers."""
    if recovery["mode"] == "global":
        return f"{recovery['rate']:g}"
    rates = [layer["rate"] for layer in recovery["layers"]]
    return " ".join("-" if rate is None else f"{rate:g}" for rate in rates)


def tables_of(found: Found) -> dict[str, str]:
    """Return the rows as Markdown, and what `local` brings of what `global` does."""
    lines: list[Sequence[object]] = []
    for row in rows():
        one, start = found[row.name], _perplexity(found, f"{row.cut}, as cut")
        how = one["recovery"]
        if not how:
            lines.append((row.name, f"{one['kept']:.4f}", f"{start:.4f}", *["-"] * 9))
            continue
        after, gone = _perplexity(found, row.name), _gone(found, row.cut, row.way)
        held = [f"{how['held_out_perplexity'][when]:.4f}" for when in ("before", "after")]
        lines.append((
            row.name, f"{one['kept']:.4f}", f"{start:.4f}", f"{after:.4f}", f"{gone:.1%}", *held,
            how["trains"], rate_of(how), how["steps"], f"{how['tokens']:,}",
            f"{one['seconds']['recover']:.0f}",
        ))  # fmt: skip
    columns = ("row", "kept", "before", "after", "excess gone", "held-out before", "held-out after",
               "trains", "rate", "steps", "tokens", "recover, s")  # fmt: skip
    shares = []
    for cut in CUTS:
        if f"{cut}, local" in found:
            local, whole = (_gone(found, cut, way) for way in ("local", "global"))
            ratio = f"{local / whole:.0%}" if whole else "-"
            shares.append((cut, f"{local:.1%}", f"{whole:.1%}", ratio))
    return {
        f"Dense: {next(iter(found.values()))['dense']:.4f}.": table(columns, lines),
        "Share of the excess perplexity that is gone:": table(
            ("cut", "local", "global", "local of global"), shares
        ),
    }


def main() -> None:
    """Make every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where rows are kept [a temporary folder]")
    parser.add_argument("--only", nargs="+", help="make these rows, and no table")
    parser.add_argument("--quick", action="store_true", help="few sequences; writes nothing")
    given = parser.parse_args()
    if not at_hand(TOY):
        return
    keys = stored(TOY, sequences=32 if given.quick else None) | {"threads": 1}
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="recover-table-") as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [r for r in rows() if not given.only or r.name in given.only]
        found = {row.name: kept_or_measured(row, keys, folder) for row in chosen}
    if given.only:
        return
    said = {k: str(v).replace(str(SHARED), "../shared") for k, v in keys.items()}
    report(
        Result(
            claim="recover_table",
            method=METHOD,
            configuration={
                **said,
                **{cut: dict(own) for cut, own in CUTS.items()},
                **{f"recover, {row.way}": dict(row.recover) for row in rows() if row.recover},
            },
            tables=tables_of(found),
            goals=goals_of(found),
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    with_code_apart(main)
