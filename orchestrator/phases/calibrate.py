"""Stream the calibration tokens through the stages, and sum the statistics of every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.messages import Assignment, Microbatch, StepDone, UnitDone, UnitTask
from actors.storage.files import FileEntry
from orchestrator.engine.dispatch import task_of
from orchestrator.engine.partial_sums import Partials
from orchestrator.engine.pipeline import Pass, PassPlan, Saving, run_side_by_side
from orchestrator.phases.context import RunContext
from orchestrator.rundir.layout import CALIBRATION_TOKENS
from planners.calibration import shard_cuts
from planners.canonical_json import SCHEMA_VERSION, fingerprint
from planners.errors import NumericsError
from planners.model.taps import Statistic, layer_statistics
from planners.plan import StagePlan
from planners.units.shards import added_units, rounds, shard_units
from planners.units.units import Unit


def boundary_name(stream: str, layer: int, index: int) -> str:
    """Return the name of the file of the activations that enter a layer."""
    return f"boundary/{stream}-layer-{layer:05d}-mb-{index:05d}.safetensors"


def assignments(  # noqa: PLR0913 each is a field of an Assignment
    wave: Sequence[StagePlan],
    *,
    run_uri: str,
    checkpoint_uri: str,
    family: str,
    dtype: str,
    statistics: frozenset[Statistic] = frozenset(),
    model_store: str = "",
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
            model_store=model_store,
        )
        for stage in wave
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """A part of the calibration tokens and the units of its sums.

    Attributes:
        number: from 0.
        microbatches: first, one past the last.
        units: one a layer, those without a record.
        partials: its sums so far.
    """

    number: int
    microbatches: tuple[int, int]
    units: list[Unit]
    partials: Partials

    def of(self, wave: Sequence[StagePlan]) -> list[Unit]:
        """Return the units of the layers of a wave."""
        return [unit for unit in self.units if wave[0].first <= unit.index < wave[-1].last]


def calibrate(context: RunContext) -> None:
    """Accumulate the statistics of every layer that has no record, wave by wave.

    Raises:
        CompressionError: a weight is invalid, or too many workers were lost.
    """
    plan = context.prepared.plan
    todo = context.ledger.todo([unit for unit in context.sums if unit.taps])
    lacking = [_lacking(context, unit) for unit in todo]
    rows = context.prepared.identity.batching.microbatches
    shards = _shards(context, lacking, len(rows))
    passing = _passing(context, shards)
    total = sum(_steps_left(wave, here) for wave, here in zip(plan.waves, passing, strict=True))
    with context.phase("calibrate", total=total):
        for number, (wave, here) in enumerate(zip(plan.waves, passing, strict=True)):
            for together in rounds(len(here), plan.chains):
                passes = [
                    _pass(context, number, rows, here[shard], first_slot=chain * len(wave))
                    for chain, shard in enumerate(together)
                ]
                run_side_by_side(context.pool, passes)
            _add_up(context, [u for u in lacking if wave[0].first <= u.index < wave[-1].last])
            if number > 0 and here:
                _forget_boundaries(context, wave[0].first, len(rows))
        if todo:
            shards[0].partials.clear()


def _lacking(context: RunContext, unit: Unit) -> Unit:
    """Return the unit that sums the missing taps of a layer: those that none of its files holds."""
    missing = context.ledger.missing_taps(unit)
    if missing == set(unit.taps):
        return unit
    # Existing sums stay as they are; added ones are written to a separate file.
    return replace(unit, taps=tuple(sorted(missing)), suffix=f"-{fingerprint(sorted(missing))[:8]}")


def _shards(context: RunContext, lacking: Sequence[Unit], num_microbatches: int) -> list[_Shard]:
    """Return all shards, each with its units that have no record."""
    shape = context.prepared.plan.shape
    missing = _missing(lacking, context)
    cuts = shard_cuts(context.prepared.identity.batching.shards, num_microbatches)
    found = []
    for number, microbatches in enumerate(cuts):
        units = shard_units(lacking, number, len(cuts))
        # A stage sums the same taps of all its layers; partial sums hold them all.
        taps = {
            u.index: tuple(str(s) for s in layer_statistics(shape, missing, u.index)) for u in units
        }
        summed = {u.index: replace(u, taps=taps[u.index]) for u in units}
        found.append(
            _Shard(
                number=number,
                microbatches=microbatches,
                units=[u for u in units if len(cuts) == 1 or not context.ledger.done(u)],
                partials=Partials(context.run, context.ledger, summed),
            )
        )
    return found


def _pass(
    context: RunContext,
    number: int,
    rows: list[tuple[int, int]],
    shard: _Shard,
    *,
    first_slot: int,
) -> Pass:
    """Return the pass of one shard through one wave, on the chain that starts at ``first_slot``."""
    prepared, wave = context.prepared, context.prepared.plan.waves[number]
    into, out = wave[0].first, wave[-1].last
    units = {unit.name: unit for unit in shard.of(wave)}
    last = out == prepared.plan.shape.num_layers
    start, stop = shard.microbatches
    sequences = rows[stop - 1][1] - rows[start][0]
    tokens = sequences * prepared.calibration.shape[1]

    def on_step(at: int, microbatch: Microbatch, done: StepDone) -> None:
        index = start + microbatch.index
        if at == len(wave) - 1 and done.boundary is not None:
            unit = boundary_unit(context, out, index)
            context.ledger.commit(unit, _boundary_done(unit, done, done.boundary), attempt=1)
        context.journal.emit("calibrate", unit=f"microbatch {index}",
                             worker=f"worker-{first_slot + at}", start=done.started,
                             seconds=done.seconds, tokens=done.num_tokens,
                             peak_bytes=done.peak_bytes)  # fmt: skip

    def on_published(task: UnitTask, done: UnitDone) -> None:
        seen = done.values["num_tokens"]
        if seen != tokens:
            raise NumericsError(f"{task.unit}: summed {seen} tokens, expected {tokens}")
        context.ledger.commit(units[task.unit], done, attempt=1)
        shard.partials.forget(task.index)
        context.journal.emit(task.kind, unit=task.unit, worker=done.worker,
                             start=done.started, seconds=done.seconds,
                             peak_bytes=done.peak_bytes,
                             written_bytes=done.written_bytes)  # fmt: skip

    plan = PassPlan(
        kind="calibrate",
        assignments=[
            replace(each, statistics_dtype=_stored_dtype(context), contents=prepared.contents)
            for each in assignments(
                wave,
                run_uri=context.run.uri,
                checkpoint_uri=prepared.model_uri,
                family=prepared.plan.shape.family,
                dtype=prepared.identity.batching.dtype,
                statistics=_missing(shard.units, context),
                model_store=prepared.config.model_store,
            )
        ],
        microbatches=[
            Microbatch(
                index=index - start,
                tokens=CALIBRATION_TOKENS,
                rows=rows[index],
                observe=True,
                read_boundary=boundary_name("calibration", into, index) if into else "",
                write_boundary="" if last else boundary_name("calibration", out, index),
            )
            for index in range(start, stop)
        ],
        publish=[
            [task_of(u) for u in units.values() if stage.first <= u.index < stage.last]
            for stage in wave
        ],
        saving=Saving(
            partials=shard.partials,
            every=prepared.config.calibration.save_microbatches,
            stage_bytes=[stage.bytes["statistics"] for stage in wave],
        ),
    )
    return Pass(
        context.pool, plan, first_slot=first_slot, on_step=on_step, on_published=on_published
    )


def _add_up(context: RunContext, lacking: Sequence[Unit]) -> None:
    """Add the shards of these layers, where there are several, and remove their files."""
    count = context.prepared.identity.batching.shards
    if count == 1:
        return
    shards = [shard_units(lacking, shard, count) for shard in range(count)]
    units = [*(u for shard in shards for u in shard), *added_units(lacking, shards)]
    context.do(units)


def _stored_dtype(context: RunContext) -> str:
    """Return the dtype in which a pass writes grams; sums of shards are added unrounded."""
    identity = context.prepared.identity
    return identity.statistics_dtype if identity.batching.shards == 1 else "float64"


def _steps_left(wave: Sequence[StagePlan], shards: Sequence[_Shard]) -> int:
    """Return how many microbatches the stages of a wave still have to process."""
    left = 0
    for shard in shards:
        start, stop = shard.microbatches
        layers = {unit.index for unit in shard.units}
        summed = {p.layer: p.next for p in shard.partials.found(layers)}
        for stage in wave:
            mine = [summed.get(i, 0) for i in range(stage.first, stage.last) if i in layers]
            left += stop - start - min(mine, default=0)
    return left


def boundary_unit(context: RunContext, layer: int, index: int) -> Unit:
    """Return the unit of the activations that enter a layer, for one microbatch."""
    key = {"schema": SCHEMA_VERSION, "kind": "boundary", "layer": layer, "index": index}
    identity = fingerprint(context.prepared.identity.key())
    return Unit(
        name=f"boundary-layer-{layer:05d}-mb-{index:05d}",
        kind="boundary",
        index=layer,
        inputs=(),
        fingerprint=fingerprint({**key, "identity": identity}),
    )


def _passing(context: RunContext, shards: Sequence[_Shard]) -> list[list[_Shard]]:
    """Return the shards that pass each wave: to be summed in it, or in a later wave."""
    found: list[list[_Shard]] = []
    later: set[int] = set()
    for wave in reversed(context.prepared.plan.waves):
        here = [
            shard
            for shard in shards
            if shard.of(wave)
            or (shard.number in later and not _has_passed(context, shard, wave[-1].last))
        ]
        found.insert(0, here)
        later = {shard.number for shard in here}
    return found


def _has_passed(context: RunContext, shard: _Shard, layer: int) -> bool:
    """Return whether all activations of a shard that enter a layer are stored."""
    return all(
        context.ledger.done(boundary_unit(context, layer, index))
        for index in range(*shard.microbatches)
    )


def _forget_boundaries(context: RunContext, layer: int, count: int) -> None:
    for index in range(count):
        context.run.delete(boundary_name("calibration", layer, index))


def _missing(units: Sequence[Unit], context: RunContext) -> frozenset[Statistic]:
    """Return the statistics that at least one of these units still has to sum."""
    names = {tap for unit in units for tap in unit.taps}
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


def tell_missing(context: RunContext, uri: str) -> None:
    """Emit an event with the statistics that a run does not have; none for an empty ``uri``."""
    missing = {tap for unit in context.sums for tap in context.ledger.missing_taps(unit)}
    if uri and missing:
        context.journal.emit("statistics missing", detail=f"{', '.join(sorted(missing))} in {uri}")
