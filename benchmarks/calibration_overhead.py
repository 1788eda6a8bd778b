"""Calibration costs at most 1.3 times the bare forward pass and the gram products it needs.

Claim: streaming tokens through a stage, which sums a gram at each of the 2L + 1 sites of the
residual stream, takes at most 1.3 times as long as the same tokens
through transformers' own decoder layers in a plain loop without hooks, plus one float32 ``x.T @ x``
for each site. The rest is overhead: hooks, sums of x, float64 accumulation, bookkeeping.

Method: both in this process, one thread, float32, random weights, on the same tokens; they take
turns, and the ratio is that of the medians. Three sizes: where compute dominates, with
the default microbatch and with a single sequence; and a model of toy size, where nothing hides the
overhead.

    .venv/bin/python benchmarks/calibration_overhead.py [--quick]
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from bare import (
    TOKENS,
    bare_forward,
    llama,
    load_bare,
    write_random_model,
    write_random_tokens,
)
from result_file import Goal, Result, load_average, report, table
from turns import Timings, take_turns

from actors.messages import Assignment, Microbatch, Packed, UnitTask, WorkerSetup, unpack
from actors.worker.stage import Stage
from planners.model.taps import Statistic

GOAL = 1.3
THREADS = 1
COLUMNS = (
    "case",
    "bare, s",
    "bare + grams, s",
    "calibration, s",
    "ratio of medians",
    "ratio by round",
    "ratio in processor time",
    "writing the sums once, s",
)
STATISTICS = frozenset(Statistic(tap, "gram") for tap in ("resid_attn", "resid_mlp", "resid_out"))
METHOD = """\
In one process, one thread, float32, on the same tokens, in turns: `Stage.step` with the statistics
of SliceGPT; transformers' own decoder layers in a loop without hooks; the same loop with one
float32 `x.T @ x` at each of the 2L + 1 sites. The outputs are compared first and are the same bits.
The ratio is calibration over bare + grams, each the median on the clock of the rounds that count:
those in which other processes left the machine alone, if there are enough. Beside it the same in
processor time, which does not count the time that others had the core."""


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
            self._stage.written(unit)

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


def measure(case: Case, effort: Mapping[str, float]) -> tuple[Timings, float]:
    """Return the times of one case, and the seconds of writing the sums once."""
    with tempfile.TemporaryDirectory(prefix="calibration-overhead-") as folder:
        subject = Subject(case, Path(folder))
        subject.require_same_output()
        turns = {
            "bare": lambda: timed(subject.forward),
            "bare + grams": lambda: timed(subject.forward_and_grams),
            "calibration": lambda: timed(subject.calibrate),
        }
        for turn in turns.values():  # for warmth
            turn()
        return take_turns(turns, **effort), timed(subject.publish)


def timed(work: Callable[[], None]) -> float:
    """Return the seconds that some work takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Measure every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of each [%(default)s]")
    parser.add_argument(
        "--patience",
        type=int,
        default=600,
        help="seconds to wait for a quiet machine [%(default)s]",
    )
    parser.add_argument("--quick", action="store_true", help="a toy run that writes nothing")
    given = parser.parse_args()
    rounds, cases = (2, QUICK) if given.quick else (given.rounds, CASES)
    effort = {
        "rounds": rounds,
        "max_rounds": rounds if given.quick else 2 * rounds,
        "patience_seconds": 0 if given.quick else given.patience / len(cases),
    }
    load = load_average()
    found = {case: measure(case, effort) for case in cases}
    rows, goals, notes = [], [], []
    for case, (timings, publish) in found.items():
        ratio = timings.median("calibration") / timings.median("bare + grams")
        cpu_ratio = timings.median_cpu("calibration") / timings.median_cpu("bare + grams")
        ratios = timings.ratios("calibration", "bare + grams")
        rows.append(
            (
                case.name,
                *(f"{timings.median(n):.3f}" for n in ("bare", "bare + grams", "calibration")),
                f"{ratio:.3f}",
                f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
                f"{cpu_ratio:.3f}",
                f"{publish:.3f}",
            )
        )
        text = f"{case.name}: calibration within {GOAL} x of bare + grams"
        goals.append(Goal(text=text, measured=f"{ratio:.3f}", met=ratio <= GOAL))
        notes.append(f"{case.name}: {timings.say()}")
    report(
        Result(
            claim="calibration_overhead",
            method=METHOD,
            configuration={
                **{case.name: case for case in cases},
                "rounds": f"{rounds} quiet ones, after one for warmth; medians",
                "threads": THREADS,
                "dtype": "float32",
                "statistics": ", ".join(sorted(map(str, STATISTICS))),
            },
            tables={"Seconds a repetition:": table(COLUMNS, rows)},
            goals=goals,
            notes=notes,
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()
