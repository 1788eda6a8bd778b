"""Calibration and compression of 80 layers on 64 workers: an efficiency of 0.9, simulated.

The schedule is of Llama-2-70B's shapes under the policy that a run executes
(`planners.simulation.simulate` calls the same `planners.units.flow`, `planners.units.frontier` and
`planners.memory.placement`). Task times are those of a sample timed on this machine, scaled to the
true shapes by their operations; the sample is
named under Configuration. Efficiency is T(1) / (N T(N)) of calibrate and compress together, T(1)
with one shard, without the start of processes, with no losses and no spread. A worker has 64 GiB:
what does not fit is done in waves, whose boundaries are written and read.

Shards (`calibration.shards`) are those of the divisors of the workers that are the fastest; adding
them up is part of calibrate. What limits it is found by leaving one thing out at a time.
"""

import argparse
from dataclasses import dataclass, replace

from result_file import Goal, Result, load_average, report, table

from actors import methods
from orchestrator.forecast.clocks import ProfileKey, kept_clock
from orchestrator.forecast.sample_run import measure
from orchestrator.recipe.method_options import resolve_options
from planners.batching import TokenBatching
from planners.catalogue import CONFIGS, shape_of
from planners.method import Target
from planners.planning import Workload, make_plan
from planners.simulation.simulate import PassPhase, Phase, SimulatedRun, UnitsPhase, simulate
from planners.simulation.timetable import CostModel, timetable
from planners.units.job import Job

MODEL, LENGTH = "llama-2-70b", 2048
WORKERS = (1, 2, 4, 8, 16, 32, 40, 64, 80, 128, 256, 512)
GOAL_AT, GOAL = 64, 0.9
WORKER_BYTES = 64 * 2**30
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


def job_of(case: Case, num_workers: int, shards: int = 1) -> Job:
    """Return the run of a case on so many workers."""
    spec, shape = methods.spec(case.method), shape_of(MODEL)
    options = resolve_options(spec, {})
    batching = TokenBatching(
        sequences=case.sequences,
        sequence_length=LENGTH,
        microbatch_sequences=case.microbatch_sequences,
        dtype="float32",
        shards=shards,
    )
    plan = make_plan(
        shape,
        spec,
        options,
        target=Target(keep_fraction=0.75),
        work=Workload(batching=batching, num_workers=num_workers, worker_bytes=WORKER_BYTES),
    )
    return Job(
        plan=plan, spec=spec, options=options, data=batching, evaluation_tokens=0, finish=False
    )


def clock_of(case: Case, *, budget_seconds: float) -> CostModel:
    """Return the clock of a sample of this machine, timed now unless it was before."""
    job = job_of(case, 1)
    setting = ProfileKey(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A number of shards on a number of workers, and what comes of it."""

    shards: int
    phases: list[Phase]
    course: SimulatedRun
    num_waves: int


def way_of(case: Case, clock: CostModel, num_workers: int, shards: int = 1) -> Way:
    """Return calibration and compression of a case under the policy of a run."""
    job = job_of(case, num_workers, shards)
    phases = [phase for phase in timetable(job, clock) if phase.name in PHASES]
    course = simulate(phases, num_workers=num_workers, driver_seconds=clock.driver_seconds)
    return Way(shards=shards, phases=phases, course=course, num_waves=len(job.plan.waves))


def best_way(case: Case, clock: CostModel, num_workers: int) -> Way:
    """Return the fastest of the numbers of shards that divide the workers."""
    most = case.sequences // case.microbatch_sequences
    counts = [n for n in range(1, min(num_workers, most) + 1) if num_workers % n == 0]
    ways = [way_of(case, clock, num_workers, shards) for shards in counts]
    return min(ways, key=lambda way: way.course.seconds)


def limits(way: Way, clock: CostModel, num_workers: int, alone: float) -> dict[str, float]:
    """Return what -> the efficiency without that one limit."""

    def seconds(phases: list[Phase], *, driver: float = clock.driver_seconds) -> float:
        return simulate(phases, num_workers=num_workers, driver_seconds=driver).seconds

    def efficiency(seconds: float) -> float:
        return alone / (num_workers * seconds)

    found = {"the driver's own time": efficiency(seconds(way.phases, driver=0.0))}
    passes = [phase for phase in way.phases if isinstance(phase, PassPhase)]
    units = [phase for phase in way.phases if isinstance(phase, UnitsPhase)]
    added = [phase for phase in units if phase.name == "calibrate"]
    shrinking = [phase for phase in units if phase.name == "compress"]
    stages = num_workers // max(len(p.chains) for p in passes)
    even: list[Phase] = [
        replace(p, steps=[sum(p.steps) / stages] * min(stages, len(p.steps))) for p in passes
    ]
    found["stages of unequal length, or fewer stages than workers"] = efficiency(
        seconds([*even, *units])
    )
    # Of a pass that is long enough, filling and draining the pipeline is nothing.
    full = sum(
        max(map(len, p.chains)) * max(p.steps) + max(p.loads) + max(map(sum, p.publishes))
        for p in passes
    )
    found["filling and draining the pipeline"] = efficiency(full + seconds(list(units)))
    loaded: list[Phase] = [
        replace(p, loads=[0.0] * len(p.loads), publishes=[[] for _ in p.publishes]) for p in passes
    ]
    found["reading the layers and writing the sums"] = efficiency(seconds([*loaded, *units]))
    rest: list[Phase] = [*passes, *shrinking]
    found["adding shards up"] = efficiency(seconds(rest))
    shared = sum(sum(u.seconds.values()) / num_workers for u in shrinking)
    rest = [*passes, *added]
    found["units that do not divide by the workers"] = efficiency(seconds(rest) + shared)
    return found


def _tables(case: Case, clock: CostModel) -> tuple[dict[str, str], float]:
    alone = way_of(case, clock, 1).course.seconds
    rows, at_goal = [], 0.0
    for count in WORKERS:
        way, plain = best_way(case, clock, count), way_of(case, clock, count)
        reached = alone / (count * way.course.seconds)
        at_goal = reached if count == GOAL_AT else at_goal
        rows.append([
            str(count), str(way.shards), str(way.num_waves), f"{way.course.seconds:,.0f}",
            *(f"{way.course.phases[name]:,.0f}" for name in PHASES),
            f"{reached:.3f}",
            f"{alone / (count * plain.course.seconds):.3f}",
        ])  # fmt: skip
    columns = ("workers", "shards", "waves", "seconds", *PHASES, "efficiency", "with one shard")
    beyond = {
        str(count): limits(best_way(case, clock, count), clock, count, alone)
        for count in (GOAL_AT, 2 * GOAL_AT, 8 * GOAL_AT)
    }
    names = list(beyond[str(GOAL_AT)])
    title = (
        f"{case.method}, {case.sequences} x {LENGTH} tokens in microbatches of "
        f"{case.microbatch_sequences * LENGTH}"
    )
    tables = {
        f"{title}:": table(columns, rows),
        f"{title}, efficiency without one limit:": table(
            ("workers", *names),
            [[count, *(f"{e:.3f}" for e in found.values())] for count, found in beyond.items()],
        ),
    }
    return tables, at_goal


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
        found, reached = _tables(case, clock)
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
                "With one shard a stage is a whole number of layers: from 41 to 79 workers the "
                "longest has two, so 64 are no faster in the pass than 40; beyond 80 the rest have "
                "no stage. Shards fill them: each chain has fewer stages, and less to fill.",
                "Shards change the bytes of a result by rounding alone; how many there are is in "
                "the recipe, so workers that come and go change nothing.",
                *notes,
            ],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()
