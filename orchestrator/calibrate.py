"""Streaming the calibration tokens, and the evaluation tokens of the dense model, through it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from actors.messages import Assignment, Microbatch, StepDone, UnitDone, UnitTask
from actors.storage.files import FileEntry
from orchestrator.context import CALIBRATION_TOKENS, RunContext
from orchestrator.partials import Partials
from orchestrator.pipeline import Pass, PassPlan, Saving
from planners.errors import NumericsError
from planners.plan import SCHEMA_VERSION, StagePlan, Statistic, fingerprint
from planners.units import Unit, layer_statistics


def cut(num_sequences: int, *, size: int) -> list[tuple[int, int]]:
    """Return the microbatches as row ranges, in order; the last may be smaller."""
    starts = range(0, num_sequences, size)
    return [(start, min(start + size, num_sequences)) for start in starts]


def boundary_name(stream: str, layer: int, index: int) -> str:
    """Return the file of the activations that enter a layer."""
    return f"boundary/{stream}-layer-{layer:05d}-mb-{index:05d}.safetensors"


def assignments(
    wave: Sequence[StagePlan],
    *,
    run_uri: str,
    checkpoint_uri: str,
    family: str,
    dtype: str,
    statistics: frozenset[Statistic] = frozenset(),
) -> list[Assignment]:
    """Return what each stage of a wave loads."""
    return [
        Assignment(
            run_uri=run_uri,
            checkpoint_uri=checkpoint_uri,
            family=family,
            first=stage.first,
            last=stage.last,
            embedding=stage.embedding,
            head=stage.head,
            statistics=statistics,
            dtype=dtype,
        )
        for stage in wave
    ]


def calibrate(context: RunContext) -> None:
    """Accumulate the statistics of every layer that has no record, wave by wave.

    Raises:
        CompressionError: a weight is broken, or too many workers were lost.
    """
    todo = {unit.index for unit in context.ledger.todo([u for u in context.sums if u.taps])}
    waves = context.prepared.plan.waves
    wanted = _wanted_waves(context, todo)
    rows = cut(len(context.prepared.calibration), size=_size(context))
    partials = _partials(context)
    summed = {p.layer: p.next for p in partials.found(todo)}
    total = sum(_steps_left(waves[w], todo, summed, len(rows)) for w in wanted)
    with context.phase("calibrate", total=total):
        for number in wanted:
            _calibrate_wave(context, number, rows, todo, partials)
            if number > 0:
                _forget_boundaries(context, waves[number][0].first, len(rows))
        if todo:
            partials.clear()


def _calibrate_wave(
    context: RunContext,
    number: int,
    rows: list[tuple[int, int]],
    todo: set[int],
    partials: Partials,
) -> None:
    prepared, wave = context.prepared, context.prepared.plan.waves[number]
    into, out = wave[0].first, wave[-1].last
    units = {unit.name: unit for unit in context.sums}
    last = out == prepared.plan.shape.num_layers
    publish = [
        [
            _task(context, u)
            for u in units.values()
            if s.first <= u.index < s.last and u.index in todo
        ]
        for s in wave
    ]

    def on_step(slot: int, microbatch: Microbatch, done: StepDone) -> None:
        if slot == len(wave) - 1 and done.boundary is not None:
            unit = boundary_unit(context, out, microbatch.index)
            context.ledger.commit(unit, _boundary_done(unit, done, done.boundary), attempt=1)
        context.journal.tell("calibrate", unit=f"microbatch {microbatch.index}",
                             worker=f"worker-{slot}", start=done.started, seconds=done.seconds,
                             tokens=done.num_tokens, peak_bytes=done.peak_bytes)  # fmt: skip

    def on_published(task: UnitTask, done: UnitDone) -> None:
        seen, expected = done.values["num_tokens"], prepared.plan.calibration_tokens
        if seen != expected:
            raise NumericsError(f"{task.unit}: {seen} tokens were summed, not {expected}")
        context.ledger.commit(units[task.unit], done, attempt=1)
        partials.forget(task.index)
        context.journal.tell("statistics", unit=task.unit, worker=done.worker,
                             start=done.started, seconds=done.seconds,
                             peak_bytes=done.peak_bytes,
                             written_bytes=done.written_bytes)  # fmt: skip

    plan = PassPlan(
        kind="calibrate",
        assignments=[
            replace(each, statistics_dtype=prepared.identity.statistics_dtype)
            for each in assignments(
                wave,
                run_uri=context.run.uri,
                checkpoint_uri=prepared.model_uri,
                family=prepared.plan.shape.family,
                dtype=prepared.identity.compute_dtype,
                statistics=_missing(context),
            )
        ],
        microbatches=[
            Microbatch(
                index=index,
                tokens=CALIBRATION_TOKENS,
                rows=ab,
                observe=True,
                read_boundary=boundary_name("calibration", into, index) if into else "",
                write_boundary="" if last else boundary_name("calibration", out, index),
            )
            for index, ab in enumerate(rows)
        ],
        publish=publish,
        saving=Saving(
            partials=partials,
            every=prepared.config.calibration.save_microbatches,
            stage_bytes=[stage.bytes["statistics"] for stage in wave],
        ),
    )
    Pass(context.pool, plan, on_step=on_step, on_published=on_published).run()


def _partials(context: RunContext) -> Partials:
    """Return the partial sums of what is summed now: of a layer, all taps that any layer lacks."""
    num_layers = context.prepared.plan.shape.num_layers
    taps = {
        u.index: tuple(str(s) for s in layer_statistics(_missing(context), u.index, num_layers))
        for u in context.sums
    }
    units = {u.index: replace(u, taps=taps[u.index]) for u in context.sums}
    return Partials(context.run, context.ledger, units)


def _steps_left(
    wave: Sequence[StagePlan], todo: set[int], summed: Mapping[int, int], num_microbatches: int
) -> int:
    """Return how many microbatches the stages of a wave have before them."""
    done = (
        min((summed.get(i, 0) for i in range(s.first, s.last) if i in todo), default=0)
        for s in wave
    )
    return sum(num_microbatches - each for each in done)


def boundary_unit(context: RunContext, layer: int, index: int) -> Unit:
    """Return the unit of the activations that enter a layer, for one microbatch."""
    key = {"schema": SCHEMA_VERSION, "kind": "boundary", "layer": layer, "index": index}
    identity = fingerprint(context.prepared.identity)
    return Unit(
        name=f"boundary-layer-{layer:05d}-mb-{index:05d}",
        kind="boundary",
        index=layer,
        inputs=(),
        fingerprint=fingerprint({**key, "identity": identity}),
    )


def _wanted_waves(context: RunContext, todo: set[int]) -> list[int]:
    """Return the waves to run: those with layers to do, and those whose output they need."""
    waves = context.prepared.plan.waves
    num_microbatches = len(cut(len(context.prepared.calibration), size=_size(context)))
    wanted: list[int] = []
    for number in reversed(range(len(waves))):
        wave = waves[number]
        own = any(wave[0].first <= layer < wave[-1].last for layer in todo)
        needed = bool(wanted) and not all(
            context.ledger.done(boundary_unit(context, wave[-1].last, index))
            for index in range(num_microbatches)
        )
        if own or needed:
            wanted.insert(0, number)
    return wanted


def _forget_boundaries(context: RunContext, layer: int, count: int) -> None:
    for index in range(count):
        context.run.delete(boundary_name("calibration", layer, index))


def _size(context: RunContext) -> int:
    return context.prepared.identity.microbatch_sequences


def _task(context: RunContext, unit: Unit) -> UnitTask:
    missing = context.ledger.missing_taps(unit)
    # Sums that are there already stay as they are; what is added gets a file of its own.
    suffix = "" if missing == set(unit.taps) else f"-{fingerprint(sorted(missing))[:8]}"
    return UnitTask(
        unit=unit.name, kind=unit.kind, index=unit.index, inputs=unit.inputs, suffix=suffix
    )


def _missing(context: RunContext) -> frozenset[Statistic]:
    """Return the statistics that at least one layer lacks."""
    names = {tap for unit in context.sums for tap in context.ledger.missing_taps(unit)}
    return frozenset(s for s in context.prepared.statistics if str(s) in names)


def _boundary_done(unit: Unit, done: StepDone, entry: FileEntry) -> UnitDone:
    return UnitDone(
        unit=unit.name,
        worker="",
        incarnation=done.incarnation,
        device="",
        files=(entry,),
        started=done.started,
        seconds=done.seconds,
    )
