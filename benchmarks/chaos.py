"""Whatever is lost in a run, and whenever: the checkpoint has the bytes of the undisturbed one.

Claim: a run that loses a worker, a node, or a node that said so before, in any phase, ends by
itself with the same bytes, and no unit is done again after its record was written.

Method: three nodes of one core and a head without any, as raylets on this machine, with the health
check of `orchestrator/cluster.py`; a random model of four layers; one disturbance a run, from a
seed. Each run is compared with one that nothing disturbed.

    .venv/bin/python -m benchmarks.chaos --seeds 0-7

Not yet among them: the driver, several nodes at once, all workers; and a run directory on S3.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else ray writes a token into the home folder

from actors.storage.files import Directory
from orchestrator import cluster
from orchestrator.journal import read_events
from tests.builders import compress_local, result_files, save_model
from tests.nodes import Disturbance, Nodes, WatchedExecutor, node_of

PHASES = {"calibrate": 10, "evaluate": 8, "basis": 9, "layer": 4}  # event -> how many there are
WORKERS = 2
DEADLINE_SECONDS = 20.0  # of a drained node; it is then killed


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one disturbed run.

    Attributes:
        seconds: of the whole run.
        noticed: seconds until the driver said so; None where it had no need to.
        same: the result has the bytes of the undisturbed run.
        repeated: units that were done again after their record.
    """

    loss: str
    phase: str
    seconds: float
    noticed: float | None
    same: bool
    repeated: int


def lose_node(nodes: Nodes, executor: WatchedExecutor, worker: str) -> None:
    """Kill a raylet and all its workers."""
    nodes.kill(node_of(nodes, executor, worker))


def freeze_node(nodes: Nodes, executor: WatchedExecutor, worker: str) -> None:
    """Stop a raylet and all its workers, as a machine that vanished from the network."""
    nodes.freeze(node_of(nodes, executor, worker))


def lose_worker(nodes: Nodes, executor: WatchedExecutor, worker: str) -> None:
    """Kill one worker process; its node stays."""
    del nodes
    os.kill(executor.places[worker].pid, signal.SIGKILL)


def drain_node(nodes: Nodes, executor: WatchedExecutor, worker: str) -> None:
    """Tell Ray that a node will go; `main` kills it when the run is over."""
    node = node_of(nodes, executor, worker)
    cluster.drain(node.node_id, seconds=DEADLINE_SECONDS, message="chaos")


LOSSES: dict[str, Callable[[Nodes, WatchedExecutor, str], None]] = {
    "node killed": lose_node,
    "node frozen": freeze_node,
    "worker killed": lose_worker,
    "node drained": drain_node,
}
TOLD = ("node lost", "worker crashed", "preempted", "stalled")


def disturbed(seed: int, nodes: Nodes, model: Path, expected: dict[str, bytes]) -> Outcome:
    """Do one run with one loss; what, when and where follow from the seed."""
    chosen = random.Random(seed)
    loss, phase = chosen.choice(list(LOSSES)), chosen.choice(list(PHASES))
    count, worker = chosen.randint(1, PHASES[phase]), f"worker-{chosen.randrange(WORKERS)}"
    executor = WatchedExecutor()
    event = Disturbance(phase, count, lambda: LOSSES[loss](nodes, executor, executor.there(worker)))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        out = Path(folder)
        compress_local(
            model, out, executor=executor, listener=event, workers=WORKERS,
            calibration={"save_microbatches": 2},
        )  # fmt: skip
        seconds = time.monotonic() - begun
        done = Counter(
            e["unit"] for e in read_events(Directory(folder)) if e["kind"] in ("basis", "layer")
        )
        told = [e["at"] for e in event.events if e["kind"] in TOLD]
        return Outcome(
            loss=loss,
            phase=f"{phase} {count}",
            seconds=seconds,
            noticed=min(told) - event.at if told and event.at is not None else None,
            same=result_files(out) == expected,
            repeated=sum(times - 1 for times in done.values()),
        )


def main() -> int:
    """Do the runs of the seeds that are given; return 1 if one of them did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0-3", help="FIRST-LAST")
    first, _, last = parser.parse_args().seeds.partition("-")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, Nodes(WORKERS + 1) as nodes:
        model = save_model(Path(folder) / "model", num_hidden_layers=4)
        compress_local(model, Path(folder) / "undisturbed")
        expected = result_files(Path(folder) / "undisturbed")
        for seed in range(int(first), int(last or first) + 1):
            found = disturbed(seed, nodes, model, expected)
            nodes.refill()
            held = found.same and not found.repeated
            failed += not held
            noticed = "-" if found.noticed is None else f"{found.noticed:.1f} s"
            print(
                f"{seed:4} {found.loss:14} {found.phase:13} noticed {noticed:>7}, "
                f"{found.seconds:6.1f} s, {'same bytes' if found.same else 'OTHER BYTES'}, "
                f"{found.repeated} done twice",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
