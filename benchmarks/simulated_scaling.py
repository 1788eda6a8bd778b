"""Calibration and compression of 80 layers on 64 workers: an efficiency of 0.9, simulated.

The schedule is of Llama-2-70B's shapes under the policy that a run executes (`planners.schedule`
calls the same `planners.flow`, `planners.frontier` and `planners.placement`). Task times are those
of a sample timed on this machine, scaled to the true shapes by their operations; the sample is
named under Configuration. Efficiency is T(1) / (N T(N)) of calibrate and compress together, without
the start of processes, with no losses and no spread. Workers have the memory that they need.

What limits it is found by leaving one thing out at a time. The last table is of a policy that does
NOT exist in the code: several chains of stages side by side, each with its share of the
microbatches and sums of its own, which are added in the order of the shares at the end.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from result_file import Goal, Result, load_average, report, table

from actors import methods
from orchestrator.measure import Setting, kept_clock, measure
from orchestrator.method_options import resolve_options
from planners.catalogue import CONFIGS, shape_of
from planners.plan import Target
from planners.planning import Workload, make_plan
from planners.schedule import PassPhase, Phase, UnitsPhase, simulate
from planners.timetable import Clock, Job, timetable
from planners.units import Unit
from planners.work import Data, Work, publish_work

MODEL, LENGTH = "llama-2-70b", 2048
WORKERS = (1, 2, 4, 8, 16, 32, 40, 64, 80, 128, 256, 512)
GOAL_AT, GOAL = 64, 0.9
PHASES = ("calibrate", "compress")
METHOD = (__doc__ or "").partition("\n\n")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How much calibration data, in which pieces, for which method."""

    method: str
    sequences: int
    microbatch_sequences: int


CASES = (
    Case(method="slicegpt", sequences=128, microbatch_sequences=2),
    Case(method="slicegpt", sequences=1024, microbatch_sequences=2),
    Case(method="svdllm", sequences=1024, microbatch_sequences=2),
)


def job_of(case: Case, num_workers: int) -> Job:
    """Return the run of a case on so many workers."""
    spec, shape = methods.spec(case.method), shape_of(MODEL)
    options = resolve_options(spec, {})
    tokens = case.microbatch_sequences * LENGTH
    plan = make_plan(
        shape,
        spec,
        options,
        target=Target(keep_fraction=0.75),
        work=Workload(
            sequences=case.sequences,
            sequence_length=LENGTH,
            microbatch_sequences=case.microbatch_sequences,
            compute_dtype="float32",
            num_workers=num_workers,
            worker_bytes=2**60,
        ),
    )
    data = Data(
        tokens=case.sequences * LENGTH,
        sequence_length=LENGTH,
        microbatch_tokens=tokens,
        dtype="float32",
    )
    return Job(plan=plan, spec=spec, options=options, data=data, evaluation_tokens=0, finish=False)


def clock_of(case: Case, *, budget_seconds: float) -> Clock:
    """Return the clock of a sample of this machine, timed now unless it was before."""
    job = job_of(case, 1)
    setting = Setting(
        config=CONFIGS[MODEL],
        shape=job.shape,
        method=case.method,
        options=job.options,
        target=Target(keep_fraction=0.75),
        data=job.data,
        device="cpu",
        threads=1,
    )
    found = kept_clock(setting) or measure(setting, budget_seconds=budget_seconds)
    return replace(found, start_seconds=0.0)


def phases_of(case: Case, clock: Clock, num_workers: int) -> list[Phase]:
    """Return calibration and compression of a case under the policy of a run."""
    found = timetable(job_of(case, num_workers), clock)
    return [phase for phase in found if phase.name in PHASES]


def seconds_of(phases: list[Phase], num_workers: int, clock: Clock) -> float:
    """Return how long phases take."""
    course = simulate(phases, num_workers=num_workers, driver_seconds=clock.driver_seconds)
    return course.seconds


def limits(case: Case, clock: Clock, num_workers: int, alone: float) -> dict[str, float]:
    """Return what -> the efficiency without that one limit."""
    phases = phases_of(case, clock, num_workers)

    def efficiency(changed: list[Phase], *, driver: float = clock.driver_seconds) -> float:
        course = simulate(changed, num_workers=num_workers, driver_seconds=driver)
        return alone / (num_workers * course.seconds)

    found = {"the driver's own time": efficiency(phases, driver=0.0)}
    passes = [phase for phase in phases if isinstance(phase, PassPhase)]
    others = [phase for phase in phases if not isinstance(phase, PassPhase)]
    mean = [
        replace(p, steps=[sum(p.steps) / num_workers] * min(num_workers, len(p.steps)))
        for p in passes
    ]
    found["stages of unequal length, or fewer stages than workers"] = efficiency([*mean, *others])
    # Of a pass that is long enough, filling and draining the pipeline is nothing.
    filled = sum(max(len(p.microbatches) * step for step in p.steps) + max(p.loads) for p in passes)
    rest = seconds_of(others, num_workers, clock)
    found["filling and draining the pipeline"] = alone / (num_workers * (filled + rest))
    shared = [sum(u.seconds.values()) / num_workers for u in others if isinstance(u, UnitsPhase)]
    passing = seconds_of(list(passes), num_workers, clock)
    found["units that do not divide by the workers"] = alone / (
        num_workers * (passing + sum(shared))
    )
    return found


def replicated(case: Case, clock: Clock, num_workers: int) -> tuple[float, int]:
    """Return seconds and the best number of chains, of the policy that does not exist yet."""
    best = (math.inf, 0)
    job, layers = job_of(case, 1), shape_of(MODEL).num_layers
    statistics = job.spec.statistics(job.options)
    sums = publish_work(job.shape, statistics)
    merge = Work(read=sums.written, touched=sums.written * 3)
    for chains in (n for n in range(1, num_workers + 1) if num_workers % n == 0):
        stages = num_workers // chains
        if layers % stages or case.sequences // case.microbatch_sequences < chains:
            continue
        phases = phases_of(case, clock, stages)
        count = -(-(case.sequences // case.microbatch_sequences) // chains)
        changed: list[Phase] = [
            replace(p, microbatches=[1.0] * count) if isinstance(p, PassPhase) else p
            for p in phases
            if isinstance(p, PassPhase)
        ]
        units = [
            Unit(name=f"sum-{i}", kind="statistics", index=i, inputs=(), fingerprint="")
            for i in range(layers)
        ]
        each = clock.seconds("statistics", merge.times(chains) + sums) if chains > 1 else 0.0
        merging = UnitsPhase(name="compress", units=units, seconds={u.name: each for u in units})
        rest = [p for p in phases_of(case, clock, num_workers) if isinstance(p, UnitsPhase)]
        seconds = seconds_of(changed, stages, clock) + seconds_of(
            [merging, *rest], num_workers, clock
        )
        best = min(best, (seconds, chains))
    return best


def _tables(case: Case, clock: Clock) -> tuple[dict[str, str], float, Mapping[str, Any]]:
    alone = seconds_of(phases_of(case, clock, 1), 1, clock)
    rows, at_goal = [], 0.0
    for count in WORKERS:
        phases = phases_of(case, clock, count)
        course = simulate(phases, num_workers=count, driver_seconds=clock.driver_seconds)
        reached = alone / (count * course.seconds)
        at_goal = reached if count == GOAL_AT else at_goal
        better, chains = replicated(case, clock, count)
        said = f"{alone / (count * better):.3f} ({chains} chains)" if chains else "no such cut"
        rows.append([
            str(count), f"{course.seconds:,.0f}",
            *(f"{course.phases[name]:,.0f}" for name in PHASES), f"{reached:.3f}", said,
        ])  # fmt: skip
    columns = ("workers", "seconds", *PHASES, "efficiency", "with chains side by side (not built)")
    beyond = [
        [str(count), *(f"{e:.3f}" for e in limits(case, clock, count, alone).values())]
        for count in (GOAL_AT, 2 * GOAL_AT, 8 * GOAL_AT)
    ]
    names = list(limits(case, clock, GOAL_AT, alone))
    title = (
        f"{case.method}, {case.sequences} x {LENGTH} tokens in microbatches of "
        f"{case.microbatch_sequences * LENGTH}"
    )
    tables = {
        f"{title}:": table(columns, rows),
        f"{title}, efficiency without one limit:": table(("workers", *names), beyond),
    }
    return tables, at_goal, {"alone": alone}


def main() -> None:
    """Simulate and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a sample [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="one case; writes nothing")
    given = parser.parse_args()
    load = load_average()
    tables: dict[str, str] = {}
    goals, notes, configuration = [], [], {}
    for case in CASES[:1] if given.quick else CASES:
        clock = clock_of(case, budget_seconds=given.budget)
        found, reached, _ = _tables(case, clock)
        tables |= found
        goals.append(
            Goal(
                text=f"{case.method}, {case.sequences} sequences: efficiency {GOAL} at {GOAL_AT}",
                measured=f"{reached:.3f}",
                met=reached >= GOAL,
            )
        )
        said = "; ".join(clock.notes) or "timed at the true shapes"
        configuration[f"sample for {case.method}"] = f"{clock.source}; {said}"
    report(
        Result(
            claim="simulated_scaling",
            method=METHOD,
            configuration={"model": f"{MODEL}, 80 layers, float32 pass", **configuration},
            tables=tables,
            goals=goals,
            notes=[
                "A stage is a whole number of layers: from 41 to 79 workers the longest stage has "
                "two, so 64 are no faster in the pass than 40; beyond 80 the rest have no stage.",
                "The last table column is a policy that the code does not have.",
                *notes,
            ],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()
