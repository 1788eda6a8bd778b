"""The simulated clock: what is known by hand, and what holds whatever the times are."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.simulation.simulate import (
    PassPhase,
    Quantiles,
    Risk,
    SoloPhase,
    UnitsPhase,
    outlook,
    simulate,
)
from planners.units import flow
from planners.units.units import Unit

SECONDS = st.floats(0.01, 30, allow_nan=False)


def unit(name, *inputs):
    return Unit(name=name, kind="layer", index=0, inputs=inputs, fingerprint=name)


@st.composite
def unit_phases(draw):
    count = draw(st.integers(1, 12))
    names = [f"u{i}" for i in range(count)]
    units = []
    for i, name in enumerate(names):
        inputs = draw(st.sets(st.sampled_from(names[:i]), max_size=2)) if i else ()
        units.append(unit(name, *sorted(inputs)))
    seconds = {name: draw(SECONDS) for name in names}
    return UnitsPhase(name="compress", units=units, seconds=seconds)


@st.composite
def passes(draw):
    stages = draw(st.integers(1, 5))
    times = st.lists(SECONDS, min_size=stages, max_size=stages)
    return PassPhase(
        name="calibrate",
        loads=draw(times),
        steps=draw(times),
        chains=[[1.0] * draw(st.integers(1, 9)) for _ in range(draw(st.integers(1, 3)))],
        publishes=[[draw(SECONDS)] for _ in range(stages)],
        handover=draw(st.floats(0, 1)),
    )


def longest_chain(phase):
    ends = {}
    for each in phase.units:  # inputs come before what reads them
        ends[each.name] = phase.seconds[each.name] + max((ends[n] for n in each.inputs), default=0)
    return max(ends.values())


@given(unit_phases())
def test_one_worker_takes_the_sum_of_the_units(phase):
    course = simulate([phase], num_workers=1)
    assert course.seconds == pytest.approx(sum(phase.seconds.values()))
    assert course.busy == pytest.approx(course.seconds)


@given(unit_phases(), st.integers(1, 6))
def test_units_are_never_faster_than_their_chain_or_their_share(phase, workers):
    course = simulate([phase], num_workers=workers)
    total = sum(phase.seconds.values())
    assert course.seconds >= longest_chain(phase) - 1e-6
    assert course.seconds >= total / workers - 1e-6
    # A worker that could start something never waits (Graham's bound).
    assert course.seconds <= total / workers + longest_chain(phase) + 1e-6
    assert course.busy == pytest.approx(total)


@given(passes())
def test_a_pass_is_never_faster_than_its_slowest_stage_or_its_first_microbatch(phase):
    stages, counts = len(phase.steps), [len(chain) for chain in phase.chains]
    course = simulate([phase], num_workers=stages * len(counts))
    count = max(counts)
    for load, step, files in zip(phase.loads, phase.steps, phase.publishes, strict=True):
        assert course.seconds >= load + count * step + sum(files) - 1e-6
    first = phase.loads[0] + sum(phase.steps) + (stages - 1) * phase.handover
    assert course.seconds >= first - 1e-6
    once = sum(phase.loads) + sum(map(sum, phase.publishes))
    assert course.busy == pytest.approx(len(counts) * once + sum(counts) * sum(phase.steps))


@given(passes())
def test_chains_side_by_side_take_as_long_as_the_longest_alone(phase):
    stages = len(phase.steps)
    together = simulate([phase], num_workers=stages * len(phase.chains)).seconds
    alone = [
        simulate([replace(phase, chains=[chain])], num_workers=stages).seconds
        for chain in phase.chains
    ]
    assert together == pytest.approx(max(alone))


def test_a_pipeline_of_equal_stages_takes_what_is_known_by_hand():
    phase = PassPhase(
        name="calibrate", loads=[5.0] * 3, steps=[2.0] * 3, chains=[[1.0] * 8],
        publishes=[[1.0]] * 3, handover=0.5,
    )  # fmt: skip
    # 5 to load, 8 + 2 steps of 2 with two handovers of 0.5, and 1 to publish.
    assert simulate([phase], num_workers=3).seconds == pytest.approx(5 + 10 * 2 + 2 * 0.5 + 1)


def test_phases_follow_one_another_and_those_of_one_name_are_one():
    phases = [SoloPhase(name="evaluate", seconds=3.0), SoloPhase(name="stitch", seconds=1.0),
              SoloPhase(name="evaluate", seconds=4.0)]  # fmt: skip
    course = simulate(phases, num_workers=2)
    assert course.seconds == 8.0
    assert dict(course.phases) == {"evaluate": 7.0, "stitch": 1.0}


def test_the_driver_costs_its_time_for_each_answer():
    phase = UnitsPhase(name="compress", units=[unit("a"), unit("b", "a")], seconds={"a": 1, "b": 1})
    assert simulate([phase], num_workers=4, driver_seconds=0.25).seconds == 2.5


@given(passes(), unit_phases(), st.integers(0, 9))
def test_the_same_seed_gives_the_same_run(phase, units, seed):
    risk = Risk(spread={"": 0.3}, worker_spread=0.1, losses_per_hour=1.0, restart_seconds=7.0)
    workers = len(phase.steps) * len(phase.chains)
    runs = [simulate([phase, units], num_workers=workers, risk=risk, seed=seed) for _ in range(2)]
    assert runs[0] == runs[1]


def test_losses_cost_time_and_every_microbatch_is_still_summed():
    phase = PassPhase(
        name="calibrate", loads=[10.0] * 3, steps=[5.0] * 3, chains=[[1.0] * 40],
        publishes=[[1.0, 1.0]] * 3,
    )  # fmt: skip
    calm = simulate([phase], num_workers=3)
    courses = [
        simulate(
            [phase], num_workers=3, seed=seed,
            risk=Risk(losses_per_hour=6.0, restart_seconds=30.0),
        )
        for seed in range(30)
    ]  # fmt: skip
    lost = [course for course in courses if course.losses]
    assert lost
    assert all(course.seconds >= calm.seconds for course in courses)
    assert sum(course.seconds for course in lost) / len(lost) > calm.seconds + 30


@given(passes(), st.integers(0, 99))
def test_looking_only_where_something_changed_finds_the_same_calls(phase, seed):
    risk = Risk(spread={"": 0.2}, losses_per_hour=1.0, restart_seconds=9.0)

    def course():
        workers = len(phase.steps) * len(phase.chains)
        return simulate([phase], num_workers=workers, risk=risk, seed=seed)

    quick = course()
    everywhere = flow.submissions
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flow, "submissions", lambda *a, **_: everywhere(*a))
        assert course() == quick


def test_durable_sums_make_a_loss_cheaper():
    phase = PassPhase(
        name="calibrate", loads=[1.0] * 2, steps=[5.0] * 2, chains=[[1.0] * 100],
        publishes=[[1.0]] * 2,
    )  # fmt: skip
    risk = Risk(losses_per_hour=8.0, restart_seconds=5.0)

    def mean(keep_every):
        kept = replace(phase, keep_every=keep_every)
        runs = [simulate([kept], num_workers=2, risk=risk, seed=s).seconds for s in range(40)]
        return sum(runs) / len(runs)

    assert mean(10) < mean(0)


def test_workers_that_never_get_anything_done_are_refused():
    phase = UnitsPhase(name="compress", units=[unit("a")], seconds={"a": 1000.0})
    with pytest.raises(PlanError, match="faster than they make progress"):
        simulate([phase], num_workers=1, risk=Risk(losses_per_hour=1e5, restart_seconds=1.0))


def test_quantiles_and_money():
    assert Quantiles.of([3.0, 1.0, 2.0]) == Quantiles(p10=1.0, p50=2.0, p90=3.0)
    phases = [SoloPhase(name="stitch", seconds=1800.0)]
    found = outlook(phases, num_workers=4, risk=Risk(), price_per_hour=1.5, draws=3)
    assert found.money == Quantiles(p10=3.0, p50=3.0, p90=3.0)
