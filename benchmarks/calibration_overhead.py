"""Calibration costs at most 1.3 times the bare forward pass and the gram products it needs.

Claim: streaming tokens through a stage, which sums the statistics of SliceGPT (a gram at each of
the 2L + 1 sites of the residual stream), takes at most 1.3 times as long as the same tokens
through transformers' own decoder layers in a plain loop without hooks, plus one float32 ``x.T @ x``
for each site. The rest is overhead: hooks, sums of x, float64 accumulation, bookkeeping.

Method: both in this process, one thread, float32, random weights, on the same tokens; they take
turns, and the ratio is that of the medians on the clock. Three sizes: where compute dominates, with
the default microbatch and with a single sequence; and a model of toy size, where nothing hides the
overhead.

    .venv/bin/python benchmarks/calibration_overhead.py [--quick]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bare import (
    TOKENS,
    bare_forward,
    llama,
    load_bare,
    take_turns,
    write_random_model,
    write_random_tokens,
)
from result_file import Goal, Result, load_average, report, table

from actors.messages import Assignment, Microbatch, Packed, UnitTask, WorkerSetup, unpack
from actors.stage import Stage
from planners.plan import Statistic

GOAL = 1.3
THREADS = 1
STATISTICS = frozenset(Statistic(tap, "gram") for tap in ("resid_attn", "resid_mlp", "resid_out"))
METHOD = """\
In one process, one thread, float32, on the same tokens, in turns: `Stage.step` with the statistics
of SliceGPT; transformers' own decoder layers in a loop without hooks; the same loop with one
float32 `x.T @ x` at each of the 2L + 1 sites. The outputs are compared first and are the same bits.
The ratio is calibration over forward + grams, each the median of all rounds on the clock; beside it
the same in processor time, which does not count what other processes took meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and one cut of the tokens.

    Attributes:
        name: as the table has it.
        hidden: width.
        intermediate: width of the MLP.
        num_layers: decoder layers.
        num_heads: attention heads, all with keys of their own.
        sequence_length: tokens of a sequence.
        microbatch: sequences that go through in one call.
        num_microbatches: calls that are timed together.
    """

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    sequence_length: int
    microbatch: int
    num_microbatches: int

    def __str__(self) -> str:
        """Return what the configuration table says."""
        return (
            f"hidden {self.hidden}, intermediate {self.intermediate}, {self.num_layers} layers, "
            f"{self.num_heads} heads; {self.num_microbatches} microbatches of {self.microbatch} x "
            f"{self.sequence_length} tokens"
        )


CASES = (
    Case(
        name="large, default microbatch",
        hidden=1024,
        intermediate=2816,
        num_layers=4,
        num_heads=16,
        sequence_length=512,
        microbatch=8,
        num_microbatches=1,
    ),
    Case(
        name="large, one sequence",
        hidden=1024,
        intermediate=2816,
        num_layers=4,
        num_heads=16,
        sequence_length=512,
        microbatch=1,
        num_microbatches=8,
    ),
    Case(
        name="toy",
        hidden=128,
        intermediate=352,
        num_layers=4,
        num_heads=8,
        sequence_length=256,
        microbatch=16,
        num_microbatches=8,
    ),
)
QUICK = (
    Case(
        name="quick",
        hidden=256,
        intermediate=704,
        num_layers=2,
        num_heads=4,
        sequence_length=256,
        microbatch=2,
        num_microbatches=2,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What one repetition took: on the clock, and of this process's own processor time."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Every repetition of one case, and the seconds of writing the sums once."""

    ours: list[Seconds]
    forward: list[Seconds]
    bare: list[Seconds]
    publish: float

    @property
    def ratio(self) -> float:
        """Ours over bare forward and products, of the medians on the clock."""
        return wall(self.ours) / wall(self.bare)

    @property
    def cpu_ratio(self) -> float:
        """The same in processor time, which does not count what other processes took."""
        ours, bare = (statistics.median(s.cpu for s in side) for side in (self.ours, self.bare))
        return ours / bare


def wall(repetitions: list[Seconds]) -> float:
    """Return the median on the clock."""
    return statistics.median(s.wall for s in repetitions)


def timed(work: Callable[[], None]) -> Seconds:
    """Return the seconds that some work takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


class Subject:
    """The same model twice in this process: held by a stage, and as transformers loads it."""

    def __init__(self, case: Case, folder: Path) -> None:
        """Write a random model and tokens, and load both."""
        self._case = case
        config = llama(
            hidden=case.hidden,
            intermediate=case.intermediate,
            num_layers=case.num_layers,
            num_heads=case.num_heads,
        )
        write_random_model(folder / "model", config)
        ids = write_random_tokens(
            folder / "run",
            num_sequences=case.microbatch * case.num_microbatches,
            sequence_length=case.sequence_length,
        )
        self._batches = ids.split(case.microbatch)
        self._stage = Stage(
            WorkerSetup(
                name="worker-0",
                incarnation="",
                threads=THREADS,
                device="cpu",
            )
        )
        self._stage.load(
            Assignment(
                run_uri=str(folder / "run"),
                checkpoint_uri=str(folder / "model"),
                family="llama",
                first=0,
                last=case.num_layers,
                embedding=True,
                head=False,
                statistics=STATISTICS,
                dtype="float32",
            )
        )
        self._bare = load_bare(folder / "model")
        self._next = 0

    def calibrate(self) -> None:
        """Pass all microbatches through the stage; each is summed."""
        for _ in self._batches:
            self._step(hand_over=False)

    def forward(self) -> None:
        """Pass all microbatches through transformers' layers."""
        for batch in self._batches:
            bare_forward(self._bare, batch, grams=False)

    def forward_and_grams(self) -> None:
        """Pass all microbatches through transformers' layers, and form the products."""
        for batch in self._batches:
            bare_forward(self._bare, batch, grams=True)

    def publish(self) -> None:
        """Write the sums, as happens once at the end of a pass."""
        for layer in range(self._case.num_layers):
            unit = f"statistics-layer-{layer:05d}"
            self._stage.publish(UnitTask(unit=unit, kind="statistics", index=layer, inputs=()))

    def require_same_output(self) -> None:
        """Refuse to compare two things that do not do the same work."""
        packed = self._step(hand_over=True)
        ours = unpack(packed, device="cpu")
        bare = bare_forward(self._bare, self._batches[0], grams=False)
        if not torch.equal(ours, bare):
            raise SystemExit(f"outputs differ by {(ours - bare).abs().max():.3e}")

    def _step(self, *, hand_over: bool) -> Packed:
        # The index always goes on: a microbatch seen before would not be summed again.
        first = self._next % len(self._batches) * self._case.microbatch
        rows = (first, first + self._case.microbatch)
        microbatch = Microbatch(
            index=self._next, tokens=TOKENS, rows=rows, observe=True, hand_over=hand_over
        )
        self._next += 1
        return self._stage.step(microbatch, None)[1]


def measure(case: Case, *, rounds: int) -> Timing:
    """Return the times of one case."""
    with tempfile.TemporaryDirectory(prefix="calibration-overhead-") as folder:
        subject = Subject(case, Path(folder))
        subject.require_same_output()
        turns = {
            "ours": lambda: timed(subject.calibrate),
            "forward": lambda: timed(subject.forward),
            "bare": lambda: timed(subject.forward_and_grams),
        }
        take_turns(turns, rounds=1)  # for warmth
        return Timing(**take_turns(turns, rounds=rounds), publish=timed(subject.publish).wall)


def main() -> None:
    """Measure every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="repetitions of each [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a toy run that writes nothing")
    given = parser.parse_args()
    rounds, cases = (2, QUICK) if given.quick else (given.rounds, CASES)
    load = load_average()
    timings = {case: measure(case, rounds=rounds) for case in cases}
    rows = [
        (
            case.name,
            *(f"{wall(side):.3f}" for side in (timing.forward, timing.bare, timing.ours)),
            f"{timing.ratio:.3f}",
            f"{timing.cpu_ratio:.3f}",
            _spread(timing),
            f"{timing.publish:.3f}",
        )
        for case, timing in timings.items()
    ]
    columns = (
        "case",
        "bare forward, s",
        "forward + grams, s",
        "calibration, s",
        "ratio of medians",
        "in processor time",
        "ratio by round",
        "writing the sums once, s",
    )
    report(
        Result(
            claim="calibration_overhead",
            method=METHOD,
            configuration={
                **{case.name: case for case in cases},
                "rounds": f"{rounds}, after one for warmth; medians",
                "threads": THREADS,
                "dtype": "float32",
                "statistics": ", ".join(sorted(map(str, STATISTICS))),
            },
            tables={"Seconds a repetition:": table(columns, rows)},
            goals=[
                Goal(
                    text=f"{case.name}: calibration within {GOAL} x of forward + grams",
                    measured=f"{timing.ratio:.3f}",
                    met=timing.ratio <= GOAL,
                )
                for case, timing in timings.items()
            ],
            load=load,
        ),
        keep=not given.quick,
    )


def _spread(timing: Timing) -> str:
    ratios = sorted(a.wall / b.wall for a, b in zip(timing.ours, timing.bare, strict=True))
    return f"{ratios[0]:.3f} to {ratios[-1]:.3f}"


if __name__ == "__main__":
    main()
