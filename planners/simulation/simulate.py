"""Discrete-event simulation of the phases of a run, with the scheduling policy of a real run.

Microbatches are scheduled by `planners.units.flow` and units by `planners.units.frontier`, as in a
run; only time is simulated: how long a task takes on a worker, when a spot worker is preempted, how
long its replacement takes. One draw is a `SimulatedRun`; many draws give quantiles.
"""

import heapq
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planners.errors import PlanError
from planners.units.flow import Flow, accept, submissions
from planners.units.frontier import Frontier
from planners.units.units import Unit

HOUR = 3600.0
QUANTILES = (0.1, 0.5, 0.9)
MAX_LOSSES = 10_000  # in one simulated run: beyond it the simulation would not end


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPhase:
    """Microbatches stream through chains of equal stages, each stage on its own worker.

    Attributes:
        name: ``calibrate`` or ``evaluate``.
        loads: seconds to load each stage.
        steps: seconds of one full microbatch in each stage.
        chains: for each chain, the sizes of its microbatches, as fractions of a full one.
        publishes: for each stage, the seconds to write each of its files of sums.
        handover: seconds to transfer the output of a stage to the next one.
        keep_every: microbatches after which partial sums are saved; 0 is never.
    """

    name: str
    loads: Sequence[float]
    steps: Sequence[float]
    chains: Sequence[Sequence[float]]
    publishes: Sequence[Sequence[float]]
    handover: float = 0.0
    keep_every: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitsPhase:
    """Units run on any free worker once their inputs are done.

    Attributes:
        name: ``allocate``, ``compress`` or ``refit``.
        units: in order of priority; inputs that are not among them are done already.
        seconds: of each, by name.
    """

    name: str
    units: Sequence[Unit]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoloPhase:
    """Work of the driver, or of one separate process, while the workers wait."""

    name: str
    seconds: float


Phase = PassPhase | UnitsPhase | SoloPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """The random parts of a simulation.

    Attributes:
        spread: standard deviation of the logarithm of a task's seconds, by phase; the key ``""`` is
            for all others.
        worker_spread: likewise of a worker's speed, drawn once per worker.
        losses_per_hour: preemptions of one worker per hour.
        restart_seconds: until its replacement can load.
    """

    spread: Mapping[str, float] = field(default_factory=dict)
    worker_spread: float = 0.0
    losses_per_hour: float = 0.0
    restart_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """One simulated run.

    Attributes:
        seconds: from the first load to the end.
        phases: name -> seconds, in the order of the run; phases of one name are added.
        busy: seconds of computing, all workers together, including work lost with a worker.
        losses: preempted workers.
    """

    seconds: float
    phases: Mapping[str, float]
    busy: float
    losses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """The 10th, 50th and 90th percentiles."""

    p10: float
    p50: float
    p90: float

    @staticmethod
    def of(values: Iterable[float]) -> "Quantiles":
        """Return the percentiles of a sample, each one of its values."""
        found = sorted(values)
        at = [found[min(len(found) - 1, int(q * len(found)))] for q in QUANTILES]
        return Quantiles(p10=at[0], p50=at[1], p90=at[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForecast:
    """The quantiles over many simulated runs.

    Attributes:
        seconds: of the run.
        phases: likewise of each phase.
        money: likewise, the price of all workers for the whole run; None without a price.
        losses: preempted workers.
        busy: share of the workers' time spent computing, median.
        draws: how many runs were simulated.
    """

    seconds: Quantiles
    phases: Mapping[str, Quantiles]
    money: Quantiles | None
    losses: Quantiles
    busy: float
    draws: int


def outlook(
    phases: Sequence[Phase],
    *,
    num_workers: int,
    risk: Risk,
    driver_seconds: float = 0.0,
    price_per_hour: float | None = None,
    draws: int = 100,
) -> RunForecast:
    """Simulate ``draws`` runs and return their quantiles; equal arguments give equal numbers."""
    runs = [
        simulate(phases, num_workers=num_workers, risk=risk, driver_seconds=driver_seconds, seed=n)
        for n in range(draws)
    ]
    seconds = Quantiles.of(r.seconds for r in runs)
    money = None
    if price_per_hour is not None:
        money = Quantiles.of(r.seconds / HOUR * num_workers * price_per_hour for r in runs)
    return RunForecast(
        seconds=seconds,
        phases={name: Quantiles.of(r.phases[name] for r in runs) for name in runs[0].phases},
        money=money,
        losses=Quantiles.of(r.losses for r in runs),
        busy=Quantiles.of(r.busy / max(r.seconds * num_workers, 1e-9) for r in runs).p50,
        draws=draws,
    )


def num_calls(phases: Sequence[Phase]) -> int:
    """Estimate the number of calls of these phases, which is the cost of simulating them."""
    passes = [p for p in phases if isinstance(p, PassPhase)]
    units = [p for p in phases if isinstance(p, UnitsPhase)]
    stepped = sum(len(p.steps) * (len(chain) + 2) for p in passes for chain in p.chains)
    return stepped + sum(len(p.units) for p in units)


def simulate(
    phases: Sequence[Phase],
    *,
    num_workers: int,
    risk: Risk | None = None,
    driver_seconds: float = 0.0,
    seed: int = 0,
) -> SimulatedRun:
    """Simulate one run of these phases, one after the other.

    Args:
        phases: each starts when the one before has ended.
        num_workers: at least as many as any pass has stages.
        risk: the random parts; None if there are none.
        driver_seconds: time of the one driver thread for each answer.
        seed: of the random numbers.
    """
    workers = _Workers(num_workers, risk or Risk(), driver_seconds, random.Random(seed))
    spent: dict[str, float] = {}
    for phase in phases:
        begun = workers.now
        if isinstance(phase, PassPhase):
            _run_pass(workers, phase)
        elif isinstance(phase, UnitsPhase):
            _run_units(workers, phase)
        else:
            workers.pass_time(phase.seconds * workers.noise(phase.name))
        spent[phase.name] = spent.get(phase.name, 0.0) + workers.now - begun
    return SimulatedRun(seconds=workers.now, phases=spent, busy=workers.busy, losses=workers.losses)


@dataclass(order=True, slots=True)
class _Event:
    """A call that returns, or a worker that is preempted."""

    at: float
    number: int
    slot: int = field(compare=False)
    incarnation: int = field(compare=False)
    what: Any = field(compare=False)


LOST = object()


class _Workers:
    """The clock, when each worker is free again, and when it is preempted."""

    def __init__(self, count: int, risk: Risk, driver_seconds: float, rng: random.Random) -> None:
        self.now = 0.0
        self.busy = 0.0
        self.losses = 0
        self._risk, self._rng, self._driver_seconds = risk, rng, driver_seconds
        self._events: list[_Event] = []
        self._number = 0
        self._incarnation = [0] * count
        self._free = [0.0] * count
        self._speed = [self._drawn(risk.worker_spread) for _ in range(count)]
        for slot in range(count):
            self._schedule_preemption(slot)

    @property
    def count(self) -> int:
        return len(self._free)

    def noise(self, name: str) -> float:
        """Return a random factor for the seconds of one task of a phase."""
        spread = self._risk.spread
        return self._drawn(spread.get(name, spread.get("", 0.0)))

    def call(self, slot: int, seconds: float, what: Any, *, name: str, after: float = 0.0) -> Any:
        """Queue a call on a worker, after those it was given before; return its ticket.

        ``after`` is how long the input takes to arrive.
        """
        took = seconds * self.noise(name) * self._speed[slot]
        begins = max(self._free[slot], self.now + after)
        self._free[slot] = begins + took
        self.busy += took
        return self._push(self._free[slot], slot, what)

    def next(self) -> _Event:
        """Advance the clock to the next event of the current workers, and return it."""
        while True:
            event = heapq.heappop(self._events)
            if event.incarnation != self._incarnation[event.slot]:
                continue
            # One driver thread handles the answers, one at a time.
            self.now = max(self.now, event.at) + self._driver_seconds
            if event.what is LOST:
                self._replace(event.slot)
            return event

    def pass_time(self, seconds: float) -> None:
        """Advance the clock while no worker has a call."""
        until = self.now + seconds
        while self._events and self._events[0].at <= until:
            event = heapq.heappop(self._events)
            if event.incarnation == self._incarnation[event.slot]:
                self.now = max(self.now, event.at)
                self._replace(event.slot)
        self.now = max(self.now, until)

    def _replace(self, slot: int) -> None:
        self.losses += 1
        if self.losses > MAX_LOSSES:
            raise PlanError(
                f"workers are preempted faster than they make progress: {MAX_LOSSES:,} preemptions",
                hint="use a lower --preemptions-per-hour, or more workers for a shorter run",
            )
        self.busy -= max(0.0, self._free[slot] - self.now)
        self._incarnation[slot] += 1
        self._free[slot] = self.now + self._risk.restart_seconds
        self._speed[slot] = self._drawn(self._risk.worker_spread)
        self._schedule_preemption(slot)

    def _schedule_preemption(self, slot: int) -> None:
        if self._risk.losses_per_hour > 0:
            lives = self._rng.expovariate(self._risk.losses_per_hour / HOUR)
            self._push(self.now + lives, slot, LOST)

    def _push(self, at: float, slot: int, what: Any) -> int:
        self._number += 1
        event = _Event(at, self._number, slot, self._incarnation[slot], what)
        heapq.heappush(self._events, event)
        return self._number

    def _drawn(self, spread: float) -> float:
        return math.exp(self._rng.gauss(0.0, spread)) if spread else 1.0


def _run_pass(workers: _Workers, phase: PassPhase) -> None:
    """Pass microbatches through all chains, as the engine's `pipeline.run_side_by_side` does."""
    stages = len(phase.steps)
    chains = [
        _SimulatedChain(workers, phase, sizes, first_slot=number * stages)
        for number, sizes in enumerate(phase.chains)
    ]
    for chain in chains:
        chain.begin()
    running = sum(not chain.finished for chain in chains)
    while running:
        event = workers.next()
        if event.slot >= stages * len(chains):
            continue  # a worker that this wave does not use
        chain = chains[event.slot // stages]
        was_finished = chain.finished
        chain.take(event)
        running += int(was_finished) - int(chain.finished)


class _SimulatedChain:
    """The stages of one chain in a pass; see `orchestrator.engine.pipeline.Pass`."""

    def __init__(
        self, workers: _Workers, phase: PassPhase, sizes: Sequence[float], *, first_slot: int
    ) -> None:
        self._workers, self._phase, self._sizes = workers, phase, sizes
        self._first = first_slot
        self._stages = [Flow() for _ in phase.steps]
        self._loading = [True] * len(self._stages)
        self._to_publish = [list(files) for files in phase.publishes]
        self._publishing = [0] * len(self._stages)

    @property
    def finished(self) -> bool:
        """Whether all stages have processed all microbatches and published their sums."""
        # From the last stage: it is the one that finishes last.
        return all(map(self._has_finished, reversed(range(len(self._stages)))))

    def begin(self) -> None:
        """Load all stages and feed them."""
        for at in range(len(self._stages)):
            self._load(at)
        self._feed(None)

    def take(self, event: _Event) -> None:
        """Handle a call that returned, or a lost worker."""
        at = event.slot - self._first
        if event.what is LOST:
            self._restart(at)
            self._feed(None)
        else:
            self._answered(at, event)
            self._feed(at)

    def _has_finished(self, at: int) -> bool:
        waiting = self._to_publish[at] or self._publishing[at] or self._loading[at]
        return self._stages[at].done == len(self._sizes) and not waiting

    def _call(self, at: int, seconds: float, what: Any, *, after: float = 0.0) -> Any:
        slot = self._first + at
        return self._workers.call(slot, seconds, what, name=self._phase.name, after=after)

    def _load(self, at: int) -> None:
        self._loading[at] = True
        self._call(at, self._phase.loads[at], "loaded")

    def _feed(self, answered: int | None) -> None:
        total = len(self._sizes)
        for at, index in submissions(self._stages, total, answered=answered):
            seconds = self._phase.steps[at] * self._sizes[index]
            after = self._phase.handover if at > 0 else 0.0
            ticket = self._call(at, seconds, "stepped", after=after)
            self._stages[at].submit(ticket, index, index)
        for at in range(len(self._stages)) if answered is None else (answered,):
            if self._stages[at].done == total and self._to_publish[at]:
                for seconds in self._to_publish[at]:
                    self._call(at, seconds, seconds)
                self._publishing[at] += len(self._to_publish[at])
                self._to_publish[at] = []

    def _answered(self, at: int, event: _Event) -> None:
        if event.what == "loaded":
            self._loading[at] = False
        elif event.what == "stepped":
            accept(self._stages, at, event.number)
        else:
            self._publishing[at] -= 1

    def _restart(self, at: int) -> None:
        stage, files = self._stages[at], list(self._phase.publishes[at])
        left = self._publishing[at] + len(self._to_publish[at])
        self._to_publish[at], self._publishing[at] = files[len(files) - left :], 0
        every = self._phase.keep_every
        kept = stage.done // every * every if every else 0
        stage.restart(kept if left else stage.done)
        self._load(at)


def _run_units(workers: _Workers, phase: UnitsPhase) -> None:
    """Do units as `orchestrator.engine.dispatch.run_units` does."""
    frontier = Frontier(phase.units, is_done=lambda _: False)
    idle = list(range(workers.count))
    running: dict[int, Unit] = {}
    while not frontier.finished:
        while idle and (unit := frontier.start()) is not None:
            slot = idle.pop(0)
            workers.call(slot, phase.seconds[unit.name], "done", name=phase.name)
            running[slot] = unit
        event = workers.next()
        if event.slot not in running:
            continue  # an idle worker was replaced
        unit = running.pop(event.slot)
        idle.append(event.slot)
        if event.what is LOST:
            frontier.give_back(unit.name)
        else:
            frontier.finish(unit)
