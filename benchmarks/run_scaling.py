"""Calibration and compression with two workers are as much faster as two bare processes are.

Claim: from the first token to the last layer on disk, two one-thread workers are faster than one by
at least 0.92 of the factor by which two bare one-thread processes beat one, in the same run. What a
pass alone loses is in `worker_scaling.py`; here layers are read, sums are stored and read again,
sites and layers are dealt out one by one, and everything is written with its records.

    .venv/bin/python benchmarks/run_scaling.py [--quick]
"""

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bare import VOCABULARY, bare_forward, llama, load_bare, write_random_model
from result_file import Result, load_average, report, table
from safetensors.torch import save_file
from torch import Tensor
from trained import nobody
from two_over_one import NICENESS, Bare, arguments, compared, turns

from actors.messages import WorkerSetup
from actors.storage.files import Directory
from orchestrator.backend import ray_cluster
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.calibrate import calibrate
from orchestrator.phases.compress import compress
from orchestrator.phases.context import RunContext
from orchestrator.phases.open_run import open_run
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.ledger import Ledger

THREADS = 1
WORKERS = (1, 2)
SLICE = 0.25
WARM = 4  # sequences of the round for warmth
READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # the rest write the residual
METHOD = """\
Speed-up = seconds with one / seconds with two. Ours: `calibrate` and `compress` of a run, SliceGPT
with its defaults, by Ray actors of one thread each in the orchestrator's own pool, from the first
call to the last record; workers are there before, with nothing loaded. Bare: processes of one
thread each with the model in memory: transformers' own layers in a loop and one float32 `x.T @ x`
at each of the 2L + 1 sites, then a float64 `torch.linalg.eigh` for each site, and for each layer
its seven products, its two shortcuts and a file; two of them do half of each, and do not exchange
what they summed. The four take turns in every round, all processes alive throughout, at the
niceness of Ray's workers; medians of the rounds that count: those in which other processes left the
machine alone, if there are enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The model and the tokens."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    sequence_length: int
    num_sequences: int

    @property
    def num_sites(self) -> int:
        """Where the residual stream gets a basis."""
        return 2 * self.num_layers + 1


FULL = Case(
    hidden=1024,
    intermediate=2816,
    num_layers=8,
    num_heads=16,
    sequence_length=256,
    num_sequences=64,
)
QUICK = Case(
    hidden=128, intermediate=352, num_layers=2, num_heads=4, sequence_length=64, num_sequences=8
)


class Ours:
    """Runs up to their layers, each by a pool of so many workers."""

    def __init__(self, case: Case, folder: Path) -> None:
        """Spawn the workers and wait until all of them are there."""
        self._case, self._folder = case, folder
        executor = RayExecutor()
        journal = Journal(Directory(str(folder / "pools")), nobody)
        setup = WorkerSetup(name="pattern", incarnation="", threads=THREADS, device="cpu")
        self._pools = {
            count: Pool(executor, setup, num_workers=count, journal=journal) for count in WORKERS
        }
        for count, pool in self._pools.items():
            while len(pool.open_slots) < count:
                pool.ready([], needed=range(count))
        self.phases: dict[int, list[tuple[float, float]]] = {count: [] for count in WORKERS}

    def seconds(self, num_workers: int, num_sequences: int, /) -> float:
        """Return how long a run takes from its first call to its last layer."""
        out = self._folder / "run"
        context = self._context(num_workers, num_sequences, out)
        begun = time.perf_counter()
        calibrate(context)
        calibrated = time.perf_counter()
        compress(context)
        done = time.perf_counter()
        shutil.rmtree(out)
        self.phases[num_workers].append((calibrated - begun, done - calibrated))
        return done - begun

    def _context(self, num_workers: int, num_sequences: int, out: Path) -> RunContext:
        recipe = {
            "model": str(self._folder / "model"),
            "method": "slicegpt",
            "slice": SLICE,
            "out": str(out),
            "calibration.source": f"tokens:{self._folder}/tokens.safetensors",
            "calibration.sequences": num_sequences,
            "calibration.microbatch_tokens": self._case.sequence_length,
            "evaluation.source": f"tokens:{self._folder}/tokens.safetensors",
            "workers": num_workers,
            "threads": THREADS,
            "device": "cpu",
        }
        prepared = prepare(load_config(None, recipe))
        open_run(prepared)
        return RunContext(
            prepared=prepared,
            form=prepared.plan.form,
            run=prepared.run,
            ledger=Ledger(prepared.run),
            journal=Journal(prepared.run, nobody),
            pool=self._pools[num_workers],
        )

    def close(self) -> None:
        """End the workers."""
        for pool in self._pools.values():
            pool.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one bare process is to do."""

    microbatches: int
    sites: int
    layers: Sequence[int]


def share_of(case: Case) -> Callable[[int, int, int], Share]:
    """Return what says which share one of several bare processes has."""

    def share(which: int, number: int, num_sequences: int) -> Share:
        return Share(
            microbatches=num_sequences // number,
            sites=len(range(which, case.num_sites, number)),
            layers=range(which, case.num_layers, number),
        )

    return share


@torch.inference_mode()
def _bare_process(end: Connection, folder: Path, case: Case) -> None:
    os.nice(NICENESS)
    torch.set_num_threads(THREADS)
    model = load_bare(folder / "model")
    ids = torch.randint(VOCABULARY, (1, case.sequence_length))
    hidden = torch.randn(4 * case.hidden, case.hidden, dtype=torch.float64)
    gram = hidden.T @ hidden
    axes = torch.linalg.qr(hidden[: case.hidden]).Q[:, : round((1 - SLICE) * case.hidden)]
    end.send("loaded")
    while (share := end.recv()) is not None:
        for _ in range(share.microbatches):
            bare_forward(model, ids, grams=True)
        for _ in range(share.sites):
            torch.linalg.eigh(gram)
        for layer in share.layers:
            save_file(_turned(model.layers[layer], axes), folder / f"bare-{layer}.safetensors")
        end.send("done")


def _turned(layer: torch.nn.Module, axes: Tensor) -> dict[str, Tensor]:
    """Return the weights of a layer in a basis, and two shortcuts."""
    single = axes.float()
    turned = {"first": (axes.T @ axes).float(), "second": (axes.T @ axes).float()}
    for name, weight in layer.named_parameters():
        if "_proj" in name:  # the norms are in what reads them
            reads = any(reader in name for reader in READS)
            turned[name] = weight @ single if reads else single.T @ weight
    return turned


@contextlib.contextmanager
def _subjects(case: Case) -> Iterator[tuple[Ours, Bare]]:
    """Give both, on a random model in a temporary directory that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="run-scaling-") as name:
        folder = Path(name)
        config = llama(
            hidden=case.hidden,
            intermediate=case.intermediate,
            num_layers=case.num_layers,
            num_heads=case.num_heads,
        )
        write_random_model(folder / "model", config)
        torch.manual_seed(0)
        ids = torch.randint(VOCABULARY, (case.num_sequences, case.sequence_length))
        save_file({"input_ids": ids}, folder / "tokens.safetensors")
        bare = Bare(_bare_process, (folder, case), number=max(WORKERS), share=share_of(case))
        with (
            contextlib.closing(bare),
            ray_cluster.connected("local", num_cpus=sum(WORKERS), num_gpus=0, store_bytes=0),
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
        ours.phases = {count: [] for count in WORKERS}
        found = compared(ours, bare, case.num_sequences, given)
    report(
        Result(
            claim="run_scaling",
            method=METHOD,
            configuration={
                "model": f"hidden {case.hidden}, intermediate {case.intermediate}, "
                f"{case.num_layers} layers, {case.num_heads} heads, vocabulary {VOCABULARY}; "
                "random float32 weights",
                "tokens": f"{case.num_sequences} microbatches of 1 x {case.sequence_length}",
                "method": f"slicegpt, slice {SLICE}, defaults",
                "threads a process": THREADS,
                "rounds": f"{given.rounds} quiet ones, after one of {WARM} sequences for warmth",
            },
            tables={
                **found.tables,
                "Ours by phase, medians of all rounds:": _by_phase(ours.phases),
            },
            goals=[found.goal],
            notes=found.notes,
            load=load,
        ),
        keep=not given.quick,
    )


def _by_phase(phases: Mapping[int, Sequence[tuple[float, float]]]) -> str:
    rows: list[tuple[Any, ...]] = []
    for number, name in enumerate(("calibrate", "compress")):
        one, two = (statistics.median(p[number] for p in phases[count]) for count in WORKERS)
        rows.append((name, f"{one:.2f}", f"{two:.2f}", f"{one / two:.3f}"))
    return table(("", "one worker, s", "two workers, s", "speed-up"), rows)


if __name__ == "__main__":
    main()
