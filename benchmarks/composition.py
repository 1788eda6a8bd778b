"""Several methods in one recipe against each method alone, at the same true keep_fraction.

Claims, on ``babyllama105`` at true keep_fraction 0.9, 0.8 and 0.7: every composed result meets the
same true budget as the single methods; and at one size at least a composition has a lower
perplexity than the best single method. SVD-LLM's allocation by type is shown beside one share for
all.

Method: all runs in this process on the stored tokens, up to the evaluation of the result. The
statistics of the dense model are summed once and reused; behind a step that changes the model they
are summed again. SliceGPT has round_to=1. With SliceGPT the first step takes half of what is to go,
svdllm on q and k a fifth of it, whichever step that is, and modegpt before another four fifths.

Needs the models and tokens in ``../shared``, which a fresh clone has not, and says so.

    .venv/bin/python benchmarks/composition.py [--quick]
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from result_file import Goal, Result, load_average, report, table
from trained import at_hand, stored, with_code_apart

MODEL = "babyllama105"
FRACTIONS = (0.9, 0.8, 0.7)
STEP = 0.01  # of the parameters: the most that two results of one size are apart

Step = tuple[str, Mapping[str, Any]]
SLICE: Step = ("slicegpt", {"round_to": 1})
SINGLE: Mapping[str, Step] = {
    "slicegpt": SLICE,
    "svdllm, one share": ("svdllm", {}),
    "svdllm, by type": ("svdllm", {"allocation": "by_type"}),
    "modegpt": ("modegpt", {}),
    "modegpt, mlp and vo": ("modegpt", {"modules": "mlp,vo"}),
}
# Share of what is to go that the first step takes.
HALF, MOST = 0.5, 0.8
COMPOSED: Mapping[str, tuple[float, Step, Step]] = {
    "modegpt mlp,vo, then slicegpt": (HALF, ("modegpt", {"modules": "mlp,vo"}), SLICE),
    "slicegpt, then modegpt mlp,vo": (HALF, SLICE, ("modegpt", {"modules": "mlp,vo"})),
    "svdllm q,k, then modegpt mlp,vo": (
        1 - MOST,
        ("svdllm", {"modules": "q_proj,k_proj"}),
        ("modegpt", {"modules": "mlp,vo"}),
    ),
    "modegpt mlp,vo, then svdllm q,k": (
        MOST,
        ("modegpt", {"modules": "mlp,vo"}),
        ("svdllm", {"modules": "q_proj,k_proj"}),
    ),
    "modegpt mlp,vo, then modegpt qk": (
        MOST,
        ("modegpt", {"modules": "mlp,vo"}),
        ("modegpt", {"modules": "qk"}),
    ),
}


def one(
    folder: str, name: str, steps: Sequence[tuple[float, Step]], *, sequences: int | None
) -> dict[str, Any]:
    """Return kept fraction, perplexities and seconds of one result."""
    from actors.storage.files import Directory
    from orchestrator.backend.local import LocalExecutor
    from orchestrator.phases.context import RunContext, new_pool
    from orchestrator.phases.open_run import open_run
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import compress_and_evaluate
    from orchestrator.rundir.journal import Journal
    from orchestrator.rundir.ledger import Ledger

    first = f"{folder}/first"
    given = {
        **stored(MODEL, sequences=sequences),
        "out": f"{folder}/{name}".replace(" ", "-"),
        "steps": [
            {"method": method, "keep_fraction": fraction, "options": dict(options)}
            for fraction, (method, options) in steps
        ],
        "stats": None if name == "first" else first,
        "keep_statistics": True,
        "threads": 1,
    }
    started = time.monotonic()
    prepared = prepare(load_config(None, given))
    open_run(prepared)
    journal = Journal(prepared.run, lambda _: None)
    pool = new_pool(prepared, LocalExecutor(), journal)
    reuse = Directory(first) if given["stats"] else None
    context = RunContext(
        prepared=prepared,
        form=prepared.plan.form,
        run=prepared.run,
        ledger=Ledger(prepared.run, reuse=reuse),
        journal=journal,
        pool=pool,
    )
    try:
        context, losses = compress_and_evaluate(context)
    finally:
        pool.close()
    return {
        "kept": context.parameters_after / prepared.plan.parameters_before,
        **{subject: loss.perplexity for subject, loss in losses.items()},
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Run, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sequences; nothing is kept")
    quick = parser.parse_args().quick
    if not at_hand(MODEL):
        return
    before, sequences = load_average(), 32 if quick else None
    found: dict[tuple[str, float], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        one(folder, "first", [(0.9, SINGLE["modegpt"])], sequences=sequences)
        for fraction in FRACTIONS:
            plans = {name: [(fraction, step)] for name, step in SINGLE.items()}
            for name, (share, *steps) in COMPOSED.items():
                sizes = (1 - share * (1 - fraction), fraction)
                plans[name] = list(zip(sizes, steps, strict=True))
            for name, plan in plans.items():
                try:
                    found[name, fraction] = one(
                        folder, f"{name} {fraction}", plan, sequences=sequences
                    )
                except Exception as error:
                    if type(error).__name__ != "PlanError":
                        raise
                    print(f"{name} at {fraction}: {error}")
                    continue
                print(name, fraction, found[name, fraction], flush=True)
    _report(found, load=before, keep=not quick)


def _report(found: Mapping[tuple[str, float], dict[str, Any]], *, load: str, keep: bool) -> None:
    dense = next(iter(found.values()))["dense"]
    rows, goals, better = [], [], []
    for name in (*SINGLE, *COMPOSED):
        cells = []
        for fraction in FRACTIONS:
            one_ = found.get((name, fraction))
            cells += ["out of reach", ""] if one_ is None else [
                f"{one_['compressed']:.4f}", f"{one_['kept']:.4f}"
            ]  # fmt: skip
        rows.append([name, *cells])
    for fraction in FRACTIONS:
        here = {n: r for (n, f), r in found.items() if f == fraction}
        gap = max(abs(r["kept"] - fraction) for r in here.values())
        goals.append(
            Goal(
                text=f"{fraction}: every result within {STEP} of the budget, and not above it",
                measured=f"at most {gap:.4f} below",
                met=gap <= STEP and all(r["kept"] <= fraction for r in here.values()),
            )
        )
        single, composed = (
            min((r["compressed"], n) for n, r in here.items() if n in names)
            for names in (SINGLE, COMPOSED)
        )
        better.append(composed[0] < single[0])
        goals.append(
            Goal(
                text=f"{fraction}: the best composition is below the best single method",
                measured=f"{composed[0]:.4f} ({composed[1]}) against {single[0]:.4f} ({single[1]})",
                met=better[-1],
            )
        )
    columns = ["recipe"]
    for fraction in FRACTIONS:
        columns += [f"perplexity at {fraction}", "kept"]
    report(
        Result(
            claim="composition",
            goals=goals,
            tables={f"`{MODEL}`, dense perplexity {dense:.4f}": table(columns, rows)},
            method=__doc__.split("Method: ")[1].split("\n\n")[0],
            configuration={
                "model": MODEL,
                "threads": "1",
                "share of the first step": "see the source",
            },
            load=load,
        ),
        keep=keep,
    )


if __name__ == "__main__":
    with_code_apart(main)
