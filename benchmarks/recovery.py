"""A node of three is lost in the middle of a pass: how soon the pass is back at full speed.

Goal: with spare capacity up, at most 15 s after a kill -9 of the node's processes, at most 25 s
after the node froze.

Method: as `chaos.py`, a longer pass; the node of a stage is lost when the last stage has seen a
third of the microbatches. Speed is how many new microbatches leave the last stage a second; before
the loss, its median gap is taken. Full speed is back when the first of `RUN` microbatches in a row
begins that leave at no more than `SLOWER` times that gap on average. What was lost and summed again
counts as time lost.

    .venv/bin/python benchmarks/recovery.py [--quick]
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from chaos import NODES, WORKERS, Harness, Heard, write_model
from result_file import Goal, Result, load_average, report, table
from spot_cluster import SpotCluster

GOALS = {"node": 15.0, "freeze": 25.0}
RUN, SLOWER = 5, 1.3
SEQUENCES = 1200
METHOD = (__doc__ or "").partition("Method: ")[2].partition("\n\n    ")[0]


def measure(harness: Harness, kind: str, out: str) -> dict[str, float]:
    """Return the usual gap, and the seconds from the loss until full speed."""
    last = f"worker-{WORKERS - 1}"
    at: list[float] = []
    lost = [0.0]

    def disturb(heard: Heard) -> bool:
        if heard.kind == "calibrate" and heard.worker == last:
            at.append(time.monotonic())
        if not lost[0] and len(at) >= SEQUENCES // 2 // 3 and harness.lose(kind, heard.driver):
            lost[0] = time.monotonic()
        return heard.kind == "phase ends" and heard.unit == "calibrate"

    course = harness.run("slicegpt", out, disturb)
    if course.failure:
        raise RuntimeError(f"{course.failure}\n{harness.log[-2000:]}")
    before = [t for t in at if t <= lost[0]][5:]
    gap = statistics.median(b - a for a, b in pairwise(before))
    after = [t for t in at if t > lost[0]]
    # Those that were on their way when the node went say nothing of the time after the stall.
    stall = max(range(len(after)), key=lambda i: after[i] - (after[i - 1] if i else lost[0]))
    for first, end in zip(after[stall:], after[stall + RUN :], strict=False):
        if end - first <= SLOWER * gap * RUN:
            return {"gap": gap, "seconds": first - lost[0]}
    raise RuntimeError("the pass did not get back to full speed before it ended")


def main() -> None:
    """Lose a node in both ways, several times each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="once each; writes nothing")
    given = parser.parse_args()
    load = load_average()
    rounds = 1 if given.quick else 3
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in GOALS}
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
        recipe: dict[str, Any] = write_model(folder, calibration=SEQUENCES)
        cluster = SpotCluster(NODES)
        try:
            harness = Harness(cluster, recipe, folder)
            for number in range(rounds):
                for kind in GOALS:
                    found[kind].append(measure(harness, kind, str(folder / f"{kind}-{number}")))
                    print(kind, found[kind][-1], flush=True)
        finally:
            cluster.close()
    seconds = {kind: [r["seconds"] for r in each] for kind, each in found.items()}
    rows = [
        (kind, f"{statistics.median(r['gap'] for r in found[kind]):.3f}",
         f"{statistics.median(each):.1f}", " ".join(f"{s:.1f}" for s in each), GOALS[kind])
        for kind, each in seconds.items()
    ]  # fmt: skip
    columns = ("lost", "usual gap, s", "full speed after, median s", "each", "goal")
    report(
        Result(
            claim="recovery",
            method=METHOD,
            configuration={
                "cluster": f"a head and {NODES} nodes of one core, {WORKERS} workers",
                "microbatches": f"{SEQUENCES // 2} of 2 x 128",
                "full speed": f"{RUN} microbatches in a row within {SLOWER} of the usual gap",
            },
            tables={"Seconds from the loss:": table(columns, rows)},
            goals=[
                Goal(
                    text=f"{kind}: at most {GOALS[kind]:g} s",
                    measured=f"{statistics.median(each):.1f} s",
                    met=statistics.median(each) <= GOALS[kind],
                )
                for kind, each in seconds.items()
            ],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    main()
