"""Timing several things in turns, and knowing when something else had the machine.

A round gives each of them one turn, so that a slow minute meets all. A round counts where other
processes and the hypervisor had less than `QUIET` of the machine in each of its turns; the choice
looks at what others did, never at what was measured.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

QUIET = 0.05  # of all cores
SAMPLE_SECONDS = 2.0
ENOUGH = 3  # quiet rounds without which noisy ones are used too
_STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One measurement.

    Attributes:
        seconds: on the clock.
        cpu: processor seconds of this process and those it started.
        others: share of all cores that other processes and the hypervisor took meanwhile.
    """

    seconds: float
    cpu: float
    others: float


Round = Mapping[str, Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What was measured, round by round."""

    rounds: Sequence[Round]

    @property
    def quiet(self) -> list[Round]:
        """The rounds that count: the quiet ones, or all where too few are."""
        quiet = [r for r in self.rounds if _others(r) < QUIET]
        return quiet if len(quiet) >= ENOUGH else list(self.rounds)

    def median(self, name: str) -> float:
        """Return the median on the clock."""
        return statistics.median(r[name].seconds for r in self.quiet)

    def median_cpu(self, name: str) -> float:
        """Return the median in processor time."""
        return statistics.median(r[name].cpu for r in self.quiet)

    def ratios(self, above: str, below: str) -> list[float]:
        """Return the ratio in each round, smallest first."""
        return sorted(r[above].seconds / r[below].seconds for r in self.quiet)

    def say(self) -> str:
        """Return how many rounds there were, and what others took in them."""
        most = max(_others(r) for r in self.quiet)
        all_quiet = most < QUIET
        return (
            f"{len(self.quiet)} of {len(self.rounds)} rounds count; other processes and the "
            f"hypervisor had at most {most:.1%} of the machine in any of their turns"
            + ("." if all_quiet else f", above the {QUIET:.0%} at which a round counts as quiet.")
        )


def take_turns(
    turns: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    max_rounds: int,
    patience_seconds: float,
) -> Timings:
    """Return timings with ``rounds`` quiet rounds, of at most ``max_rounds``.

    Args:
        turns: name -> what does the work and returns its seconds.
        rounds: quiet rounds that are enough.
        max_rounds: quiet or not, no more than this.
        patience_seconds: time to wait, in all, for the machine to be quiet before a round.
    """
    done: list[Round] = []
    while len(done) < max_rounds and sum(_others(r) < QUIET for r in done) < rounds:
        patience_seconds -= _wait_for_quiet(patience_seconds)
        done.append({name: _turn(work) for name, work in turns.items()})
    return Timings(rounds=done)


def _turn(work: Callable[[], float]) -> Turn:
    before = _Usage()
    seconds = work()
    after = _Usage()
    return Turn(seconds=seconds, cpu=after.own - before.own, others=after.others_since(before))


def _wait_for_quiet(patience_seconds: float) -> float:
    begun = time.monotonic()
    while time.monotonic() - begun < patience_seconds:
        before = _Usage()
        time.sleep(SAMPLE_SECONDS)
        if _Usage().others_since(before) < QUIET:
            break
    return time.monotonic() - begun


def _others(turns: Round) -> float:
    return max(turn.others for turn in turns.values())


class _Usage:
    """Processor seconds until now: of the machine, and of this process and those it started.

    Those that have ended count too: a turn is often a process of its own, and is gone by then.
    """

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._busy = _busy_seconds()
        this = psutil.Process()
        self.own = 0.0
        for process in (this, *this.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            ended = times.children_user + times.children_system
            self.own += times.user + times.system + ended

    def others_since(self, before: "_Usage") -> float:
        """Return the share of all cores that was neither idle nor ours; 0 where unknown."""
        if not self._busy:
            return 0.0
        others = (self._busy - before._busy) - (self.own - before.own)
        return max(0.0, others / (self._at - before._at) / (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """Return all processor seconds that were not idle, those the hypervisor took included."""
    if not _STAT.exists():
        return 0.0
    fields = [
        int(field) for field in _STAT.read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    ]
    idle, iowait = fields[3], fields[4]
    return (sum(fields) - idle - iowait) / os.sysconf("SC_CLK_TCK")
