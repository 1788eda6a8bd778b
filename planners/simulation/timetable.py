"""A plan and how long things take -> the phases that `planners.simulation.simulate` simulates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planners.batching import TokenBatching
from planners.canonical_json import to_json
from planners.method import MethodSpec, Option
from planners.model.cost import BYTES_OF, dense_model_form, linears_before
from planners.model.form import LayerForm, ModelForm, dense_form
from planners.model.shape import LINEARS, ModelShape
from planners.model.taps import Statistic, last_tap, layer_statistics
from planners.plan import RunPlan, StagePlan
from planners.simulation import work
from planners.simulation.download import FROM_HUB, stage_bytes, unit_bytes
from planners.simulation.simulate import PassPhase, Phase, SoloPhase, UnitsPhase
from planners.simulation.work import PROBE_TOKENS, Work
from planners.units.shards import rounds
from planners.units.units import (
    Identity,
    Unit,
    compression_units,
    damage_units,
    losses_units,
    refit_units,
    shard_cuts,
    statistics_units,
)

LINK = 1.0e9  # bytes a second from worker to worker, where nobody says
PROMPT = 4 * 128  # tokens of one prefill of the timing at the end
DECODES, ROUNDS = 32, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one kind of task took.

    Attributes:
        seconds: median.
        spread: standard deviation of the logarithm.
        work: of the task that was timed; others are longer by the ratio of their work.
    """

    seconds: float
    spread: float
    work: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """How long a task takes.

    Attributes:
        rates: what a worker does of each kind of work in a second.
        samples: kind of task -> what it took on the machine at hand; none where not measured.
        start_seconds: until a new process can compute.
        driver_seconds: of the one driver thread, for each answer.
        call_seconds: on top of each call, for its way to the worker and back.
        link: bytes a second from worker to worker.
        spread: of the logarithm of what is not measured.
        source: in words: measured on what, or estimated from what.
        notes: what else a reader must know to trust it.
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
        """Return the seconds of a task, scaled from the sample of its kind where there is one."""
        modelled = task.seconds(self.rates)
        sample = self.samples.get(kind)
        if sample is None:
            return modelled + self.call_seconds
        return sample.seconds * modelled / sample.work.seconds(self.rates) + self.call_seconds

    def download_seconds(self, size: float) -> float:
        """Return how much longer so many bytes take from the Hub than from where files lie."""
        return max(0.0, size / FROM_HUB - size / self.rates.read)

    def spread_of(self, *kinds: str) -> float:
        """Return the spread of the kinds of a phase: that of the widest that was measured."""
        found = [self.samples[kind].spread for kind in kinds if kind in self.samples]
        return max(found, default=self.spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run as far as its time goes.

    Attributes:
        plan: its shapes, widths and waves.
        spec: of the method.
        options: of the method.
        data: of calibration.
        evaluation_tokens: that each of both models is measured on.
        finish: verify and time the result, too.
        start: widths of the input model, where steps came before; None is the model itself.
        former: the steps before, where several methods are applied in turn.
        carried: its statistics are those of the step before, turned.
        reused: statistics that another run has kept.
        from_hub: its input is read from the Hub, by whoever needs a part of it.
    """

    plan: RunPlan
    spec: MethodSpec
    options: Mapping[str, Option]
    data: TokenBatching
    evaluation_tokens: int
    finish: bool = True
    start: ModelForm | None = None
    former: tuple["Job", ...] = ()
    carried: bool = False
    reused: frozenset[Statistic] = frozenset()
    from_hub: bool = False

    @property
    def origin(self) -> "Job":
        """The first step, whose input the run begins with."""
        return self.former[0] if self.former else self

    @property
    def input(self) -> ModelForm:
        """Of what the step begins with."""
        return self.start or dense_model_form(self.shape)

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What the method needs to know of each layer."""
        return self.spec.statistics(self.options)

    @property
    def summed(self) -> frozenset[Statistic]:
        """Those statistics that this run sums itself."""
        return self.statistics - self.reused

    @property
    def dense(self) -> ModelShape:
        """Of the model that the run begins with."""
        return self.origin.shape

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return self.plan.shape

    @property
    def form(self) -> ModelForm:
        """Of the result."""
        return self.plan.form

    @property
    def num_microbatches(self) -> int:
        """Of the calibration tokens."""
        return self.data.num_microbatches


# Which kinds of tasks a phase is made of; the spread of a phase is that of the widest.
KINDS_OF = {
    "calibrate": ("calibrate", "carried"),
    "evaluate": ("evaluate", "evaluate_compressed"),
    "allocate": ("damage", "losses"),
    "compress": ("basis", "basis_shared", "basis_sequential", "stream", "layer", "draft"),
    "refit": ("refit_layer",),
}


def timetable(job: Job, clock: CostModel, *, former: Sequence[CostModel] = ()) -> list[Phase]:
    """Return the phases of a run in their order.

    Args:
        job: the run, or its last step.
        clock: of that step.
        former: of the steps before it; ``clock`` where none is given.
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
            seconds = clock.start_seconds + clock.seconds(name, task)
            if name == "throughput" and job.origin.from_hub:
                seconds += clock.download_seconds(input_bytes(job))
            phases.append(SoloPhase(name=name, seconds=seconds))
    return phases


def _calibrations(job: Job, clock: CostModel) -> list[Phase]:
    if not job.summed:
        return []
    if job.carried:
        return [_units("calibrate", _carried(job), job, clock)]
    phases: list[Phase] = []
    for wave in job.plan.waves:
        phases += _calibrate(job, clock, wave)
    return phases


def _shrinking(job: Job, clock: CostModel) -> list[Phase]:
    """Return what one method does between its statistics and its result."""
    sums = _sums(job)
    phases: list[Phase] = []
    measures = job.spec.measures(job.options)
    if measures == "damage":
        units = damage_units(
            sums, method=job.spec.name, revision=job.spec.revision, options=job.options
        )
        phases.append(_units("allocate", units, job, clock))
        for other in job.spec.candidates[1:]:
            units = damage_units(
                sums,
                method=other.spec.name,
                revision=other.spec.revision,
                options=other.options,
                by=other.spec.name,
            )
            phases.append(_units("allocate", units, job, clock))
    elif measures == "losses":
        units = losses_units(
            sums,
            method=job.spec.name,
            revision=job.spec.revision,
            modules=job.spec.shrinks(job.options),
            form=job.form,
        )
        phases.append(_units("allocate", units, job, clock))
    made = compression_units(
        sums,
        spec=job.spec,
        options=job.options,
        form=job.form,
        num_microbatches=job.num_microbatches,
    )
    phases.append(_units("compress", made, job, clock))
    drafts = [unit for unit in made if unit.kind == "draft"]
    if drafts:
        chain, chosen = refit_units(drafts)
        phases.append(_units("refit", [*chain, *chosen], job, clock))
    phases.append(SoloPhase(name="stitch", seconds=clock.seconds("stitch", work.CALL)))
    return phases


def transfer_bytes(job: Job) -> int:
    """Return the bytes that go from stage to stage, or from wave to wave, in the whole run."""
    edges = sum(len(wave) for wave in job.plan.waves) - 1
    width = BYTES_OF[job.data.dtype]
    passed = [j.data.tokens for j in (*job.former, job) if j.summed and not j.carried]
    return edges * (sum(passed) + 2 * job.evaluation_tokens) * job.shape.hidden * width


def download_bytes(job: Job) -> int:
    """Return the bytes that the workers of the whole run read from the Hub; 0 of other inputs."""
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
    """Return the bytes of the weights of the model that the run begins with."""
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
    return found


def step_work(job: Job, stage: StagePlan, *, observe: bool, compressed: bool = False) -> Work:
    """Return one whole microbatch in one stage.

    What is observed is the input of the step; what is not is evaluated: the dense model, or the
    compressed one.
    """
    tokens = job.data.microbatch_tokens
    shape = job.shape if observe or compressed else job.dense
    total = Work(calls=1)
    for index in range(stage.first, stage.last):
        form = _form_of_pass(job, index, observe=observe, compressed=compressed)
        wanted = layer_statistics(job.summed, index, shape.num_layers) if observe else []
        ends = observe and index == shape.num_layers - 1  # nobody reads what leaves it
        linears = linears_before(last_tap(wanted)) if ends else LINEARS
        total += work.half_forward(shape, form, linears, tokens=tokens, data=job.data)
        if observe:
            total += work.layer_statistics_work(shape, wanted, tokens=tokens, form=form)
    if stage.head and not observe:
        width = job.form.head_dim if compressed else shape.hidden
        total += work.loss_work(shape, width, tokens=tokens)
    return total


def stage_load_work(
    job: Job, stage: StagePlan, *, observe: bool = False, compressed: bool = False
) -> Work:
    """Return loading one stage."""
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
    return job.input.layers[layer] if observe else dense_form(job.dense)


def unit_work(job: Job, unit: Unit) -> Work:
    """Return the work of one unit of compression.

    Raises:
        KeyError: nobody has said what such a unit does.
    """
    for other in job.spec.candidates[1:]:
        if unit.kind == "damage" and unit.name.startswith(f"damage-{other.spec.name}-"):
            job = replace(job, spec=other.spec, options=other.options)
    return _UNIT_WORK[unit.kind](job, unit.index)


def verify_work(job: Job) -> Work:
    """Return reading, hashing, running and generating with the result, once each."""
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
    """Return prefill and decode of both models, in all their rounds."""
    total = Work(calls=1)
    for count in (job.plan.parameters_before, job.plan.parameters_after):
        width = BYTES_OF[job.shape.dtype]
        once = Work(matmul=2 * count * (PROMPT + 4 * DECODES), touched=DECODES * count * width)
        total += once.times(ROUNDS) + Work(read=count * width)
    return total


def _sums(job: Job) -> list[Unit]:
    identity = Identity(
        model_revision="", calibration_hash="", batching=job.data, threads=1, device="",
    )  # fmt: skip
    return statistics_units(identity, job.statistics, job.shape.num_layers)


def _carried(job: Job) -> list[Unit]:
    """Return one unit a layer that turns its sums; what it reads is there."""
    return [replace(u, kind="carried", name=f"carried-{u.index}", inputs=()) for u in _sums(job)]


def _sizes(tokens: int, data: TokenBatching) -> list[float]:
    """Return the microbatches of so many tokens, as shares of a whole one."""
    whole, rest = divmod(tokens, data.microbatch_tokens)
    return [1.0] * whole + ([rest / data.microbatch_tokens] if rest else [])


def _calibrate(job: Job, clock: CostModel, wave: Sequence[StagePlan]) -> list[Phase]:
    """Return the passes of all shards through a wave, and what adds them up."""
    layers = job.input.layers
    publishes = [
        [
            clock.seconds("statistics", work.publish_work(job.shape, wanted, layers[index]))
            for index in range(stage.first, stage.last)
            if (wanted := layer_statistics(job.summed, index, job.shape.num_layers))
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
    return [*passes, _units("calibrate", held, job, clock)]


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
    """Return reading and writing one microbatch between this wave and those beside it."""
    size = job.data.microbatch_tokens * job.shape.hidden * BYTES_OF[job.data.dtype]
    read = size if stage == wave[0] and stage.first > 0 else 0
    written = size if stage == wave[-1] and stage.last < job.shape.num_layers else 0
    return Work(read=read, written=written)


def _handover(job: Job, clock: CostModel) -> float:
    size = job.data.microbatch_tokens * job.shape.hidden * BYTES_OF[job.data.dtype]
    return size / clock.link


def _units(name: str, units: Sequence[Unit], job: Job, clock: CostModel) -> UnitsPhase:
    # Alike units take alike time; of a chain of thousands each is asked for once.
    known: dict[Any, float] = {}
    seconds = {}
    for unit in units:
        size = _unit_download(job, unit)
        key = (unit.kind, unit.index if _is_special(job, unit) else -2, size)
        if key not in known:
            seconds_here = clock.seconds(unit.kind, unit_work(job, unit))
            known[key] = seconds_here + clock.download_seconds(size)
        seconds[unit.name] = known[key]
    return UnitsPhase(name=name, units=units, seconds=seconds)


def _is_special(job: Job, unit: Unit) -> bool:
    if unit.kind in ("basis_sequential", "stream"):
        return True
    return any(len(set(map(_plain, form.layers))) > 1 for form in (job.form, job.input))


def _plain(form: Any) -> str:
    return str(to_json(form))


def _shards(job: Job) -> list[tuple[int, int]]:
    return shard_cuts(int(job.options["shards"]), job.num_microbatches)


def _stream(job: Job, site: int, shard: int) -> Work:
    first, last = _shards(job)[shard]
    passed = job.data.microbatches[first:last]
    before = max(site - 1, 0)
    return work.stream_work(
        job.shape,
        job.form.layers[before // 2],
        site,
        _site_dim(job, before),
        replace(job.data, sequences=passed[-1][1] - passed[0][0]),
    )


def _layer(job: Job, index: int) -> Work:
    wanted = layer_statistics(job.statistics, index, job.shape.num_layers)
    return work.layer_work(
        job.shape,
        job.form.layers[index],
        wanted,
        residual=job.spec.residual,
        start=job.input.layers[index],
    )


def _adding(job: Job, index: int) -> Work:
    wanted = layer_statistics(job.summed, index, job.shape.num_layers)
    form = job.input.layers[index]
    return work.adding_work(job.shape, wanted, form, shards=job.data.shards)


def _losses(job: Job, index: int) -> Work:
    wanted = layer_statistics(job.statistics, index, job.shape.num_layers)
    return work.losses_work(job.shape, job.form.layers[index], wanted)


def _site_dim(job: Job, site: int) -> int:
    layer = job.form.layers[min(site // 2, job.shape.num_layers - 1)]
    if site == 2 * job.shape.num_layers:
        return layer.residual_out
    return layer.residual_mid if site % 2 else layer.residual_in


def _damage(job: Job, index: int) -> Work:
    start = job.input.layers[index]
    ladders = job.spec.ladders(job.shape, start, job.options).values()
    # Half of a module is where in its grid a cut is on average.
    forms = [ladder.cut(start, ladder.sizes[len(ladder.sizes) // 2]) for ladder in ladders]
    tokens = min(PROBE_TOKENS, job.data.tokens, int(job.options["probe_tokens"]))
    return work.damage_work(job.shape, forms, job.data, start, tokens=tokens)


def _basis(job: Job, site: int) -> Work:
    if site == 2 * job.shape.num_layers and "resid_out" not in {s.tap for s in job.statistics}:
        return work.CALL  # kept whole: there is nothing to decompose
    return work.basis_work(job.shape, _site_dim(job, site))


_UNIT_WORK: Mapping[str, Callable[[Job, int], Work]] = {
    "statistics": _adding,
    "basis": _basis,
    "basis_shared": lambda job, _: work.basis_work(
        job.shape, job.form.embedding_dim, sites=job.shape.num_sites
    ),
    "basis_sequential": lambda job, site: work.basis_work(
        job.shape, _site_dim(job, site), sites=len(_shards(job))
    ),
    "stream": lambda job, index: _stream(job, *divmod(index, len(_shards(job)))),
    "layer": _layer,
    "draft": _layer,
    "damage": _damage,
    "losses": _losses,
    "carried": lambda job, index: work.carried_work(
        job.shape, layer_statistics(job.statistics, index, job.shape.num_layers)
    ),
    "refit_start": lambda job, _: work.refit_start_work(job.shape, job.data),
    "refit_layer": lambda job, index: work.refit_layer_work(
        job.shape, job.form.layers[index], job.data, job.input.layers[index]
    ),
    "refit_losses": lambda job, _: work.refit_losses_work(job.shape, job.data),
    "chosen": lambda job, index: work.chosen_work(job.shape, job.form.layers[index]),
    "embedding": lambda job, _: work.table_work(
        job.shape, job.form.embedding_dim, residual=job.spec.residual
    ),
    "head": lambda job, _: work.table_work(
        job.shape, 0 if job.form.tied else job.form.head_dim, residual=job.spec.residual
    ),
}
