"""How much faster two are than one, of ours and of bare processes, which take turns."""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from result_file import Goal, table
from turns import Timings, take_turns

GOAL = 0.92
NICENESS = 15  # of Ray's workers; the bare processes take the same, so that others delay both alike


class Subject(Protocol):
    """Something that does the same work by one or by two."""

    def seconds(self, number: int, amount: int, /) -> float:
        """Return how long so many of them take for an amount of work."""
        ...


class Bare:
    """Processes that wait for a share of the work, and answer when it is done."""

    def __init__(
        self,
        work: Callable[..., None],
        arguments: Sequence[Any],
        *,
        number: int,
        share: Callable[[int, int, int], Any],
    ) -> None:
        """Start the processes and wait until each has said that it is ready.

        Args:
            work: called in each with its end of a pipe; says one thing when it is ready, and one
                for each share that it is sent, until that is None.
            arguments: of ``work``, after the pipe.
            number: of processes.
            share: returns what one of several does of an amount: (which, of how many, amount).
        """
        context = multiprocessing.get_context("spawn")
        self._share, self._ends, self._processes = share, [], []
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
            process.start()
            self._ends.append(ours)
            self._processes.append(process)
        self._wait(self._ends)

    def seconds(self, number: int, amount: int, /) -> float:
        """Return how long so many processes take for an amount of work."""
        ends = self._ends[:number]
        begun = time.perf_counter()
        for which, end in enumerate(ends):
            end.send(self._share(which, number, amount))
        self._wait(ends)
        return time.perf_counter() - begun

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join()

    def _wait(self, ends: Sequence[Connection]) -> None:
        for end in ends:
            end.recv()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedUps:
    """What was timed, and what follows.

    Attributes:
        timings: of the four.
    """

    timings: Timings

    @property
    def goal(self) -> Goal:
        """Whether ours reach `GOAL` of the bare speed-up."""
        return Goal(
            text=f"two workers reach {GOAL} of the bare speed-up",
            measured=f"{self._ours / self._bare:.3f}",
            met=self._ours / self._bare >= GOAL,
        )

    @property
    def tables(self) -> dict[str, str]:
        """Seconds of each round, and the speed-ups of their medians."""
        timings = self.timings
        by_round = [
            (
                name,
                f"{timings.median(name):.2f}",
                " ".join(f"{r[name].seconds:.2f}" for r in timings.quiet),
            )
            for name in timings.rounds[0]
        ]
        speedups = [
            ("ours", f"{self._ours:.3f}"),
            ("bare", f"{self._bare:.3f}"),
            ("ours / bare", f"{self._ours / self._bare:.3f}"),
        ]
        return {
            "Seconds:": table(("", "median", "by round"), by_round),
            "Speed-up, two over one:": table(("", "of medians"), speedups),
        }

    @property
    def notes(self) -> list[str]:
        """How quiet it was, and what one of ours takes beside one bare process."""
        alone = self.timings.median("one worker") / self.timings.median("bare, one process")
        return [
            self.timings.say(),
            f"One worker takes {alone:.3f} times as long as one bare process.",
        ]

    @property
    def _ours(self) -> float:
        return self.timings.median("one worker") / self.timings.median("two workers")

    @property
    def _bare(self) -> float:
        median = self.timings.median
        return median("bare, one process") / median("bare, two processes")


def arguments(description: str) -> argparse.Namespace:
    """Return what such a script was called with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each [%(default)s]")
    parser.add_argument(
        "--patience",
        type=int,
        default=600,
        help="seconds to wait for a quiet machine [%(default)s]",
    )
    parser.add_argument("--quick", action="store_true", help="a toy run that writes nothing")
    return parser.parse_args()


def turns(ours: Subject, bare: Subject, amount: int) -> Mapping[str, Callable[[], float]]:
    """Return the four that take turns."""
    return {
        "one worker": lambda: ours.seconds(1, amount),
        "two workers": lambda: ours.seconds(2, amount),
        "bare, one process": lambda: bare.seconds(1, amount),
        "bare, two processes": lambda: bare.seconds(2, amount),
    }


def compared(ours: Subject, bare: Subject, amount: int, given: argparse.Namespace) -> SpeedUps:
    """Time the four in turns."""
    rounds = 1 if given.quick else given.rounds
    timings = take_turns(
        turns(ours, bare, amount),
        rounds=rounds,
        max_rounds=rounds if given.quick else 2 * rounds,
        patience_seconds=0 if given.quick else given.patience,
    )
    return SpeedUps(timings=timings)
