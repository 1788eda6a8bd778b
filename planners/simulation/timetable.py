"""Make the phases that `planners.simulation.simulate` runs, from a plan and a cost model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planners.batching import TokenBatching
from planners.calibration import shard_cuts
from planners.model.cost import BYTES_OF, linears_before
from planners.model.form import LayerForm, dense_form
from planners.model.taps import last_tap, layer_statistics
from planners.plan import StagePlan
from planners.simulation.download import FROM_HUB, stage_bytes, unit_bytes
from planners.simulation.simulate import PassPhase, Phase, SoloPhase, UnitsPhase
from planners.timing import BATCHES, FEWEST_ROUNDS, NEW_TOKENS, PATIENCE_SECONDS, PROMPT_TOKENS
from planners.units import work
from planners.units.job import Job, recovering_model
from planners.units.kinds import KINDS
from planners.units.shards import rounds
from planners.units.units import (
    Identity,
    Unit,
    compression_units,
    damage_units,
    losses_units,
    recovery_units,
    refit_units,
    statistics_units,
)
from planners.units.work import Work

LINK = 1.0e9  # bytes a second from worker to worker, unless given


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A measurement of one kind of task.

    Attributes:
        seconds: median.
        spread: standard deviation of the logarithm.
        work: of the timed task; other tasks are scaled by the ratio of their work.
    """

    seconds: float
    spread: float
    work: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """How long a task takes.

    Attributes:
        rates: of each kind of work, per second and worker.
        samples: kind of task -> its measurement on this machine; empty if not measured.
        start_seconds: until a new process can compute.
        driver_seconds: of the one driver thread, for each answer.
        call_seconds: overhead of each call, to the worker and back.
        link: bytes a second from worker to worker.
        spread: standard deviation of the logarithm for tasks that are not measured.
        source: in words: what it was measured on or estimated from.
        notes: what else a reader must know to judge it.
    """

    rates: Work
    samples: Mapping[str, Sample] = field(default_factory=dict)
    start_seconds: float = 8.0
    driver_seconds: float = 0.002
    call_seconds: float = 0.002
    link: float = LINK
    spread: float = 0.1
    source: str = "estimated, not measured"
    notes: tuple[str, ...] = ()

    def seconds(self, kind: str, task: Work) -> float:
        """Return the seconds of a task, scaled from the sample of its kind if there is one."""
        modelled = task.seconds(self.rates)
        sample = self.samples.get(kind)
        if sample is None:
            return modelled + self.call_seconds
        return sample.seconds * modelled / sample.work.seconds(self.rates) + self.call_seconds

    def download_seconds(self, size: float) -> float:
        """Return how much longer reading ``size`` bytes takes from the Hub than from storage."""
        return max(0.0, size / FROM_HUB - size / self.rates.read)

    def spread_of(self, *kinds: str) -> float:
        """Return the widest measured spread of these kinds of tasks; the default if none is."""
        found = [self.samples[kind].spread for kind in kinds if kind in self.samples]
        return max(found, default=self.spread)


def timetable(job: Job, clock: CostModel, *, former: Sequence[CostModel] = ()) -> list[Phase]:
    """Return the phases of a run, in order.

    Args:
        job: the run, or its last step.
        clock: the cost model of that step.
        former: those of the steps before; ``clock`` if none are given.
    """
    phases: list[Phase] = [SoloPhase(name="calibrate", seconds=clock.start_seconds)]
    for step, own in zip(job.former, former or [clock] * len(job.former), strict=True):
        phases += _calibrations(step, own)
        phases += _shrinking(step, own)
    phases += _calibrations(job, clock)
    phases += [_evaluate(job, clock, wave, compressed=False) for wave in job.plan.waves]
    phases += _shrinking(job, clock)
    phases += [_evaluate(job, clock, wave, compressed=True) for wave in job.plan.waves]
    if job.finish:
        for name, task in (("verify", verify_work(job)), ("throughput", throughput_work(job))):
            seconds = clock.seconds(name, task)
            if name == "verify":  # one process does both
                seconds += clock.start_seconds
            if name == "throughput":
                seconds -= sum(_left_out(job, clock))
            if name == "throughput" and job.origin.from_hub:
                seconds += clock.download_seconds(input_bytes(job))
            phases.append(SoloPhase(name=name, seconds=seconds))
    return phases


def _left_out(job: Job, clock: CostModel) -> Iterator[float]:
    """Yield the seconds of batches that are not timed, because that would take too long."""
    for batch in BATCHES[1:]:
        seconds = clock.seconds("throughput", _timing_work(job, batch))
        if seconds > PATIENCE_SECONDS:
            yield seconds


def _calibrations(job: Job, clock: CostModel) -> list[Phase]:
    if not job.summed:
        return []
    if job.carried:
        return [_units(_carried(job), job, clock)]
    phases: list[Phase] = []
    for wave in job.plan.waves:
        phases += _calibrate(job, clock, wave)
    return phases


def _shrinking(job: Job, clock: CostModel) -> list[Phase]:
    """Return the phases of one method between its statistics and its result."""
    sums = _sums(job)
    phases: list[Phase] = []
    measures = job.spec.measures(job.options)
    if measures == "damage":
        units = damage_units(
            sums, method=job.spec.name, revision=job.spec.revision, options=job.options
        )
        phases.append(_units(units, job, clock))
        for other in job.spec.candidates[1:]:
            units = damage_units(
                sums,
                method=other.spec.name,
                revision=other.spec.revision,
                options=other.options,
                by=other.spec.name,
            )
            phases.append(_units(units, job, clock))
    elif measures == "losses":
        units = losses_units(
            sums,
            method=job.spec.name,
            revision=job.spec.revision,
            modules=job.spec.shrinks(job.options),
            form=job.form,
        )
        phases.append(_units(units, job, clock))
    made = compression_units(
        sums,
        spec=job.spec,
        options=job.options,
        form=job.form,
        num_microbatches=job.num_microbatches,
    )
    phases.append(_units(made, job, clock))
    drafts = [unit for unit in made if unit.kind == "draft"]
    if drafts:
        chain, chosen = refit_units(drafts)
        phases.append(_units([*chain, *chosen], job, clock))
    phases += _recovering(made, job, clock)
    phases.append(SoloPhase(name="stitch", seconds=clock.seconds("stitch", work.CALL)))
    return phases


def _recovering(made: Sequence[Unit], job: Job, clock: CostModel) -> list[Phase]:
    """Return the phases of the training of a result, made by these units."""
    how = job.recovery
    if how is None:
        return []
    cut = [unit for unit in made if KINDS[unit.kind].phase == "compress" and unit.lasting]
    cut = [unit for unit in cut if KINDS[unit.kind].of in ("layer", "model")]
    units = recovery_units(cut, how, tokens_hash="", teacher="", identity=_identity(job))
    phases: list[Phase] = []
    if units.training is None:
        phases.append(_units(units.by_layer, job, clock))
    else:
        workers = min(job.plan.num_workers, how.parts)
        task = unit_work(job, units.training).times(1 / workers)
        seconds = clock.start_seconds + clock.seconds("recover_model", task)
        phases.append(SoloPhase(name="recover", seconds=seconds))
        phases.append(_units(units.trained, job, clock))
    phases.append(_units(units.kept, job, clock))
    return phases


def transfer_bytes(job: Job) -> int:
    """Return the bytes sent from stage to stage, or wave to wave, in the whole run."""
    edges = sum(len(wave) for wave in job.plan.waves) - 1
    width = BYTES_OF[job.data.dtype]
    passed = [j.data.tokens for j in (*job.former, job) if j.summed and not j.carried]
    return edges * (sum(passed) + 2 * job.evaluation_tokens) * job.shape.hidden * width


def download_bytes(job: Job) -> int:
    """Return the bytes that all workers read from the Hub in the run; 0 for other inputs."""
    first, still = job.origin, CostModel(rates=Work(**dict.fromkeys(work.KINDS, 1.0)))
    if not first.from_hub:
        return 0
    whole = sum(stage_bytes(job.dense, stage) for wave in job.plan.waves for stage in wave)
    loaded = job.plan.chains  # evaluation; each chain holds all layers
    if first.summed:
        loaded += first.plan.chains
    units = [u for p in _shrinking(first, still) if isinstance(p, UnitsPhase) for u in p.units]
    timed = input_bytes(job) if job.finish else 0
    return loaded * whole + sum(_unit_download(first, unit) for unit in units) + timed


def _unit_download(job: Job, unit: Unit) -> int:
    if not job.from_hub:
        return 0
    return unit_bytes(job.shape, unit, to_the_end=job.options.get("damage") == "loss")


def input_bytes(job: Job) -> int:
    """Return the bytes of the weights of the run's input model."""
    return job.origin.plan.parameters_before * BYTES_OF[job.shape.dtype]


def phase_work(job: Job) -> dict[str, Work]:
    """Return the work of each phase, all workers together."""
    shape, found = job.shape, dict[str, Work]()
    whole = [StagePlan(first=0, last=shape.num_layers, embedding=True, head=True)]
    share = job.data.tokens / job.data.microbatch_tokens
    passing = [j for j in (*job.former, job) if j.summed and not j.carried]
    steps = [step_work(j, whole[0], observe=True).times(share) for j in passing]
    found["calibrate"] = sum(steps, Work())
    tokens = job.evaluation_tokens / job.data.microbatch_tokens
    both = [step_work(job, whole[0], observe=False, compressed=c) for c in (False, True)]
    found["evaluate"] = (both[0] + both[1]).times(tokens)
    still = CostModel(rates=Work(**dict.fromkeys(work.KINDS, 1.0)))
    for each in (*job.former, job):
        carried = _calibrations(each, still) if each.carried else []
        for phase in (*carried, *_shrinking(each, still)):
            if isinstance(phase, UnitsPhase):
                tasks = [unit_work(each, unit) for unit in phase.units]
                found[phase.name] = found.get(phase.name, Work()) + sum(tasks, Work())
    if job.recovery is not None and job.recovery.mode == "global":
        found["recover"] += recovering_model(job, -1)
    return found


def step_work(job: Job, stage: StagePlan, *, observe: bool, compressed: bool = False) -> Work:
    """Return the work of one full microbatch in one stage.

    With ``observe`` it calibrates on the input of the step, else it evaluates the dense or the
    compressed model.
    """
    tokens = job.data.microbatch_tokens
    shape = job.shape if observe or compressed else job.dense
    total = Work(calls=1)
    for index in range(stage.first, stage.last):
        form = _form_of_pass(job, index, observe=observe, compressed=compressed)
        wanted = layer_statistics(shape, job.summed, index) if observe else []
        ends = observe and index == shape.num_layers - 1  # the output of the last layer is not used
        roles = shape.kinds[shape.kind_of[index]].roles
        linears = linears_before(shape, last_tap(wanted)) if ends else roles
        total += work.half_forward(shape, form, linears, tokens=tokens, data=job.data)
        if observe:
            total += work.layer_statistics_work(shape, wanted, tokens=tokens, form=form)
    if stage.head and not observe:
        width = job.form.head_reads if compressed else shape.hidden
        total += work.loss_work(shape, width, tokens=tokens)
    return total


def stage_load_work(
    job: Job, stage: StagePlan, *, observe: bool = False, compressed: bool = False
) -> Work:
    """Return the work of loading one stage."""
    shape = job.shape if observe or compressed else job.dense
    total = work.CALL
    for index in range(stage.first, stage.last):
        form = _form_of_pass(job, index, observe=observe, compressed=compressed)
        total += work.load_work(shape, form)
    ends = int(stage.embedding) + int(stage.head)
    return total + work.table_load_work(shape, shape.hidden).times(ends)


def _form_of_pass(job: Job, layer: int, *, observe: bool, compressed: bool) -> LayerForm:
    if compressed:
        return job.form.layers[layer]
    return job.input.layers[layer] if observe else dense_form(job.dense, job.dense.kind_of[layer])


def unit_work(job: Job, unit: Unit) -> Work:
    """Return the work of one compression unit.

    Raises:
        KeyError: its kind has no work estimate.
    """
    for other in job.spec.candidates[1:]:
        if unit.kind == "damage" and unit.name.startswith(f"damage-{other.spec.name}-"):
            job = replace(job, spec=other.spec, options=other.options)
    work_of = KINDS[unit.kind].work
    if work_of is None:
        raise KeyError(f"units of kind {unit.kind!r} have no work estimate")
    return work_of(job, unit.index)


def verify_work(job: Job) -> Work:
    """Return the work of reading, hashing, running and generating with the result, once each."""
    written, count = job.plan.bytes_after, job.plan.parameters_after
    tokens = 2 * 64 + 16 * 40
    return Work(
        read=2 * written,
        written=written,  # hashed, not written
        matmul=2 * 2 * count * tokens,
        touched=4 * count * 34,
        calls=1,
    )


def throughput_work(job: Job) -> Work:
    """Return the work of prefill and decode of both models, in all rounds that are always done."""
    total = Work(calls=1)
    for count in (job.plan.parameters_before, job.plan.parameters_after):
        total += Work(read=count * BYTES_OF[job.shape.dtype])
    for batch in BATCHES:
        total += _timing_work(job, batch)
    return total


def _timing_work(job: Job, batch: int) -> Work:
    """Return the work of the rounds of one batch, with the one that is not counted.

    The tokens are those of a CPU: a GPU times more of them, in less time than it takes to start.
    """
    prompt, new_tokens = PROMPT_TOKENS["cpu"], NEW_TOKENS["cpu"]
    total = Work()
    for count in (job.plan.parameters_before, job.plan.parameters_after):
        read = count * BYTES_OF[job.shape.dtype]
        tokens = batch * (prompt + new_tokens)
        total += Work(matmul=2 * count * tokens, touched=new_tokens * read)
    return total.times(1 + FEWEST_ROUNDS)


def _sums(job: Job) -> list[Unit]:
    return statistics_units(_identity(job), job.statistics, job.shape)


def _identity(job: Job) -> Identity:
    return Identity(
        model_revision="", calibration_hash="", batching=job.data, threads=1, device="",
    )  # fmt: skip


def _carried(job: Job) -> list[Unit]:
    """Return one unit a layer that rotates its sums; its inputs are done already."""
    return [replace(u, kind="carried", inputs=()) for u in _sums(job)]


def _sizes(tokens: int, data: TokenBatching) -> list[float]:
    """Return the microbatches of ``tokens`` tokens, as fractions of a full one."""
    whole, rest = divmod(tokens, data.microbatch_tokens)
    return [1.0] * whole + ([rest / data.microbatch_tokens] if rest else [])


def _calibrate(job: Job, clock: CostModel, wave: Sequence[StagePlan]) -> list[Phase]:
    """Return the passes of all shards through a wave, and the units that add their sums."""
    layers = job.input.layers
    publishes = [
        [
            clock.seconds("statistics", work.publish_work(job.shape, wanted, layers[index]))
            for index in range(stage.first, stage.last)
            if (wanted := layer_statistics(job.shape, job.summed, index))
        ]
        for stage in wave
    ]
    passed = [step_work(job, s, observe=True) + _edges(job, wave, s) for s in wave]
    steps = [clock.seconds("calibrate", each) for each in passed]
    loads = [clock.seconds("load", stage_load_work(job, s, observe=True)) for s in wave]
    if job.from_hub:
        loads = _with_download(loads, job, clock, wave)
    sizes = _sizes(job.data.tokens, job.data)
    cuts = shard_cuts(job.data.shards, len(sizes))
    passes: list[Phase] = [
        PassPhase(
            name="calibrate",
            loads=loads,
            steps=steps,
            chains=[sizes[slice(*cuts[shard])] for shard in together],
            publishes=publishes,
            handover=_handover(job, clock),
        )
        for together in rounds(len(cuts), job.plan.chains)
    ]
    if len(cuts) == 1:
        return passes
    held = [u for u in _sums(job) if wave[0].first <= u.index < wave[-1].last]
    return [*passes, _units(held, job, clock)]


def _evaluate(
    job: Job, clock: CostModel, wave: Sequence[StagePlan], *, compressed: bool
) -> PassPhase:
    steps = [
        step_work(job, s, observe=False, compressed=compressed) + _edges(job, wave, s) for s in wave
    ]
    suffix = "_compressed" if compressed else ""
    loads = [
        clock.seconds(f"load{suffix}", stage_load_work(job, s, compressed=compressed)) for s in wave
    ]
    if job.origin.from_hub and not compressed:
        loads = _with_download(loads, job, clock, wave)
    sizes = _sizes(job.evaluation_tokens, job.data)
    return PassPhase(
        name="evaluate",
        loads=loads,
        steps=[clock.seconds(f"evaluate{suffix}", step) for step in steps],
        chains=[sizes[slice(*cut)] for cut in shard_cuts(job.plan.chains, len(sizes))],
        publishes=[[] for _ in wave],
        handover=_handover(job, clock),
    )


def _with_download(
    loads: Sequence[float], job: Job, clock: CostModel, wave: Sequence[StagePlan]
) -> list[float]:
    sizes = [stage_bytes(job.dense, stage) for stage in wave]
    return [t + clock.download_seconds(size) for t, size in zip(loads, sizes, strict=True)]


def _edges(job: Job, wave: Sequence[StagePlan], stage: StagePlan) -> Work:
    """Return the work of reading and writing one microbatch between adjacent waves."""
    size = job.data.microbatch_tokens * job.shape.hidden * BYTES_OF[job.data.dtype]
    read = size if stage == wave[0] and stage.first > 0 else 0
    written = size if stage == wave[-1] and stage.last < job.shape.num_layers else 0
    return Work(read=read, written=written)


def _handover(job: Job, clock: CostModel) -> float:
    size = job.data.microbatch_tokens * job.shape.hidden * BYTES_OF[job.data.dtype]
    return size / clock.link


def _units(units: Sequence[Unit], job: Job, clock: CostModel) -> UnitsPhase:
    # Equal units take equal time: computed once, because a chain has thousands of them.
    known: dict[Any, float] = {}
    seconds = {}
    for unit in units:
        size = _unit_download(job, unit)
        key = (unit.kind, unit.index if _is_special(job, unit) else -2, size)
        if key not in known:
            seconds_here = clock.seconds(unit.kind, unit_work(job, unit))
            known[key] = seconds_here + clock.download_seconds(size)
        seconds[unit.name] = known[key]
    return UnitsPhase(name=KINDS[units[0].kind].phase, units=units, seconds=seconds)


def _is_special(job: Job, unit: Unit) -> bool:
    if not KINDS[unit.kind].alike:
        return True
    return any(layer != form.layers[0] for form in (job.form, job.input) for layer in form.layers)
