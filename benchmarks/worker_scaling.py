"""Two workers go as much faster than one as two bare processes do, to within 8 %.

Claim: where compute dominates, a calibration pass through two one-thread workers is faster than
through one by at least 0.92 of the factor by which two bare one-thread processes beat one. Two
processes do not reach 2 on real machines (shared caches and memory, other tenants), so the bare
speed-up is measured in the same run. What remains is ours: filling and draining the pipeline,
handing activations over, the driver and Ray's own processes on the same cores.

Method: hidden 1024, 8 layers, random float32 weights, no head; a gram at every site. The workers
are real Ray actors in the orchestrator's own `Pool`, driven by its `Pass`: one stage of 8 layers,
or two of 4. Bare: processes with transformers' layers in a loop and the same number of products;
two of them share the microbatches evenly, the best split there is. The four take turns; all
processes stay alive throughout. Timed is the streaming, from all layers loaded to the last
microbatch done.

    .venv/bin/python benchmarks/worker_scaling.py [--quick]
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bare import (
    TOKENS,
    VOCABULARY,
    bare_forward,
    llama,
    load_bare,
    write_random_model,
    write_random_tokens,
)
from result_file import Result, load_average, report
from trained import nobody
from two_over_one import NICENESS, Bare, arguments, compared, turns

from actors.messages import Assignment, Microbatch, StepDone, UnitDone, UnitTask, WorkerSetup
from actors.storage.files import Directory
from orchestrator.backend import ray_cluster
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.engine.pipeline import Pass, PassPlan, run_side_by_side
from orchestrator.engine.worker_pool import Pool
from orchestrator.rundir.journal import Journal
from planners.model.taps import Statistic

THREADS = 1
WORKERS = 2
WARM = 4  # microbatches of the round for warmth
STATISTICS = frozenset(Statistic(tap, "gram") for tap in ("resid_attn", "resid_mlp", "resid_out"))
METHOD = """\
Speed-up = seconds with one / seconds with two. Ours: Ray actors of one thread each, one stage of
all layers or two stages of half of them, driven by the orchestrator's own pool and pass. Bare:
processes of one thread each, transformers' own layers in a loop without hooks and one float32
`x.T @ x` at each of the 2L + 1 sites; two of them do half of the microbatches each. The four take
turns in every round, all processes alive throughout and at the niceness of Ray's workers; medians
of the rounds that count: those in which other processes left the machine alone, if there are
enough. Timed is the streaming of the pass: all layers are loaded before the clock starts. With n
microbatches two stages cannot reach more than n / (n + 1) of an even split: the second waits for
the first microbatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The model and the tokens."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    sequence_length: int
    num_microbatches: int


FULL = Case(
    hidden=1024,
    intermediate=2816,
    num_layers=8,
    num_heads=16,
    sequence_length=256,
    num_microbatches=32,
)
QUICK = Case(
    hidden=256,
    intermediate=704,
    num_layers=2,
    num_heads=4,
    sequence_length=128,
    num_microbatches=8,
)


class LoadedFirst(RayExecutor):
    """Waits for layers to be loaded, so that the clock can start when all of them are."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded_at = 0.0

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Start a call; one that loads has answered when this returns."""
        ticket = super().call(handle, method, *args, num_returns=num_returns, label=label)
        if method == "load":
            while not self.ready([ticket], seconds=1.0):
                pass
            self.loaded_at = time.perf_counter()
        return ticket


class Ours:
    """Passes of the orchestrator over the first workers of a pool."""

    def __init__(self, case: Case, folder: Path) -> None:
        """Spawn the workers; nothing is loaded yet."""
        self._case, self._folder = case, folder
        self._executor = LoadedFirst()
        run = str(folder / "run")
        setup = WorkerSetup(name="pattern", incarnation="", threads=THREADS, device="cpu")
        journal = Journal(Directory(run), nobody)
        self._pool = Pool(self._executor, setup, num_workers=WORKERS, journal=journal)
        self.busy: dict[int, list[float]] = {}

    def seconds(self, num_stages: int, num_microbatches: int, /) -> float:
        """Return how long microbatches take to stream through so many stages."""
        steps = [0.0] * num_stages

        def on_step(slot: int, microbatch: Microbatch, done: StepDone) -> None:
            del microbatch
            steps[slot] += done.seconds

        def on_published(task: UnitTask, done: UnitDone) -> None:
            raise AssertionError(f"{task.unit}: nothing is published here, not {done}")

        layers = self._case.num_layers // num_stages
        plan = PassPlan(
            kind="calibrate",
            assignments=[
                Assignment(
                    run_uri=str(self._folder / "run"),
                    checkpoint_uri=str(self._folder / "model"),
                    family="llama",
                    first=stage * layers,
                    last=(stage + 1) * layers,
                    embedding=stage == 0,
                    head=False,
                    statistics=STATISTICS,
                    dtype="float32",
                )
                for stage in range(num_stages)
            ],
            microbatches=[
                Microbatch(index=index, tokens=TOKENS, rows=(index, index + 1), observe=True)
                for index in range(num_microbatches)
            ],
            publish=[[] for _ in range(num_stages)],
        )
        passing = Pass(self._pool, plan, on_step=on_step, on_published=on_published)
        run_side_by_side(self._pool, [passing])
        seconds = time.perf_counter() - self._executor.loaded_at
        self.busy.setdefault(num_stages, []).append(max(steps) / seconds)
        return seconds

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


def _bare_process(end: Connection, model_folder: Path, sequence_length: int) -> None:
    os.nice(NICENESS)
    torch.set_num_threads(THREADS)
    model = load_bare(model_folder)
    ids = torch.randint(VOCABULARY, (1, sequence_length))
    end.send("loaded")
    while (num_microbatches := end.recv()) is not None:
        for _ in range(num_microbatches):
            bare_forward(model, ids, grams=True)
        end.send("done")


@contextlib.contextmanager
def _subjects(case: Case) -> Iterator[tuple[Ours, Bare]]:
    """Give both, on a random model in a temporary directory that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="worker-scaling-") as name:
        folder = Path(name)
        config = llama(
            hidden=case.hidden,
            intermediate=case.intermediate,
            num_layers=case.num_layers,
            num_heads=case.num_heads,
        )
        write_random_model(folder / "model", config)
        write_random_tokens(
            folder / "run",
            num_sequences=case.num_microbatches,
            sequence_length=case.sequence_length,
        )
        bare = Bare(
            _bare_process,
            (folder / "model", case.sequence_length),
            number=WORKERS,
            share=lambda which, number, amount: len(range(which, amount, number)),
        )
        with (
            contextlib.closing(bare),
            ray_cluster.connected("local", num_cpus=WORKERS * THREADS, num_gpus=0, store_bytes=0),
            contextlib.closing(Ours(case, folder)) as ours,
        ):
            yield ours, bare


def main() -> None:
    """Measure and write the result."""
    given = arguments(__doc__.partition("\n")[0])
    case = QUICK if given.quick else FULL
    load = load_average()
    with _subjects(case) as (ours, bare):
        for turn in turns(ours, bare, WARM).values():
            turn()
        ours.busy.clear()
        found = compared(ours, bare, case.num_microbatches, given)
        busy = {n: statistics.median(shares) for n, shares in ours.busy.items()}
    report(
        Result(
            claim="worker_scaling",
            method=METHOD,
            configuration={
                "model": f"hidden {case.hidden}, intermediate {case.intermediate}, "
                f"{case.num_layers} layers, {case.num_heads} heads, no head; random weights",
                "tokens": f"{case.num_microbatches} microbatches of 1 x {case.sequence_length}",
                "statistics": ", ".join(sorted(map(str, STATISTICS))),
                "threads a process": THREADS,
                "dtype": "float32",
                "rounds": f"{given.rounds} quiet ones, after one of {WARM} microbatches for warmth",
            },
            tables=found.tables,
            goals=[found.goal],
            notes=[
                *found.notes,
                f"Inside their steps: the one worker {busy[1]:.1%} of the time, "
                f"the busier of two {busy[WORKERS]:.1%}.",
            ],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()
