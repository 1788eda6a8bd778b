"""Make the plan of a run from model, method, target and workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planners import refit
from planners.batching import TokenBatching
from planners.budget.budgets import budget_of
from planners.budget.schemes import SCHEMES
from planners.errors import PlanError
from planners.memory.fitting import Attempt, ways_to_fit
from planners.memory.peaks import HOST_IN_FLIGHT, LIBRARIES, Shrinking, in_flight
from planners.memory.placement import Load, load_of, place
from planners.memory.trainers import Room, trainers
from planners.method import MethodSpec, Option, Target
from planners.model.cost import (
    BYTES_OF,
    dense_start,
    forward_flops,
    gram_flops,
    linears_before,
    model_bytes,
    model_parameters,
    statistic_elements,
)
from planners.model.form import ModelForm, Start, site_dims
from planners.model.shape import ModelShape
from planners.model.taps import Statistic, last_tap, layer_statistics
from planners.plan import RunPlan
from planners.recovery import Recovery
from planners.units.kinds import unit_bytes
from planners.units.shards import chain_stages

CHECKPOINTS = 16  # of a training: two, of four float32 tensors for each one of 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much data passes through the model, in which pieces, on how many workers.

    Attributes:
        batching: of the calibration tokens.
        evaluation_dtype: of the pass that measures losses; that of calibration where it is empty.
        statistics_dtype: of grams on disk.
        num_workers: available workers.
        worker_bytes: memory of each.
        extra_statistics: summed too, for other methods.
        mapped: units read the sums as mapped pages of local files, without memory of their own.
        on_host: workers compute in the memory in which they read and write files.
        recovery: how the result is trained, where it is.
    """

    batching: TokenBatching
    num_workers: int
    worker_bytes: int
    evaluation_dtype: str = ""
    statistics_dtype: str = "float64"
    extra_statistics: frozenset[Statistic] = frozenset()
    mapped: bool = False
    on_host: bool = True
    recovery: Recovery | None = None


def make_plan(  # noqa: PLR0913 the inputs of a plan
    shape: ModelShape,
    spec: MethodSpec,
    options: Mapping[str, Option],
    *,
    target: Target,
    work: Workload,
    start: Start | None = None,
    others: Sequence[tuple[MethodSpec, Mapping[str, Option]]] = (),
) -> RunPlan:
    """Return the plan: widths, stages, waves, bytes and operations, from integers alone.

    Args:
        shape: of the model.
        spec: of the method.
        options: of the method, complete.
        target: requested size.
        work: data and workers.
        start: what the step starts from; the uncompressed model if None.
        others: methods with their options, to suggest if they would fit and this one does not.

    Raises:
        PlanError: the method does not support the model, the target cannot be met, or a layer does
            not fit a worker; the message then has the missing bytes and the cheapest ways to fit.
    """
    _require_possible(shape, spec, options, target=target, work=work, others=others)
    start = start or dense_start(shape)
    if target.fit is not None and budget_of(shape, start, target).allows(start.form):
        raise PlanError(
            f"fit: {target.fit:,} bytes hold the input model as it is: nothing has to be cut",
            hint="use a larger --serving-batch or --serving-context, or --keep-fraction",
        )
    form = spec.form(shape, start, target, options)
    statistics = spec.statistics(shape, options) | work.extra_statistics
    batching, tokens = work.batching, work.batching.tokens
    load = _load(shape, spec, options, form=form, start=start, work=work)
    missing = load.shortfall(work.worker_bytes, num_layers=shape.num_layers)
    if missing > 0:
        attempt = Attempt(
            spec=spec, options=options, batching=batching, worker_bytes=work.worker_bytes
        )

        def shortfall(tried: Attempt) -> int:
            return _shortfall(shape, tried, target=target, work=work, start=start)

        ways = ways_to_fit(attempt, shortfall, others=others)
        raise PlanError(
            f"a worker of {work.worker_bytes:,} bytes is {missing:,} bytes too small for one layer",
            hint="what would fit, cheapest first: " + "; ".join(ways),
        )
    stages = chain_stages(work.num_workers, batching.shards)
    waves = place(shape, load, num_workers=stages, worker_bytes=work.worker_bytes)
    before, after = start.parameters_before, model_parameters(shape, form)
    written = model_bytes(shape, form)
    stored = BYTES_OF[work.statistics_dtype]
    layers = start.form.layers
    sums = sum(statistic_elements(shape, s, f) for s in statistics for f in layers) * stored
    # The sequential schedule keeps the activations it reads and those it writes.
    sequential = options.get("schedule") == "sequential"
    streams = 2 if sequential else int(len(waves) > 1)
    stream = tokens * shape.hidden * BYTES_OF[batching.dtype]
    boundaries = streams * stream
    if sequential:  # and a gram for each shard of a site
        boundaries += int(options["shards"]) * shape.hidden**2 * 8
    if batching.shards > 1:  # the sums of one wave stay on disk until they are added
        held = max(wave[-1].last - wave[0].first for wave in waves)
        widest = max(sum(statistic_elements(shape, s, f) for s in statistics) for f in layers)
        boundaries += batching.shards * held * widest * 8
    of_last = layer_statistics(shape, statistics, shape.num_layers - 1)
    drafts = 0
    if options.get("refit"):
        drafts = refit.disk_bytes(written, stream_bytes=stream)
    bases = 0
    if spec.residual:
        bases = sum(site_dims(form).values()) * shape.hidden * 8
    trained, fewest = _training(shape, form, work)
    return RunPlan(
        shape=shape,
        form=form,
        waves=waves,
        parameters_before=before,
        parameters_after=after,
        bytes_before=before * BYTES_OF[shape.dtype],
        bytes_after=written,
        calibration_tokens=tokens,
        calibration_flops=forward_flops(
            shape,
            tokens=tokens,
            sequence_length=batching.sequence_length,
            form=start.form,
            last=linears_before(shape, last_tap(of_last)),
        )
        + gram_flops(shape, statistics, tokens=tokens, form=start.form),
        worker_bytes=max(sum(stage.bytes.values()) for wave in waves for stage in wave),
        disk_bytes=written + sums + boundaries + bases + drafts + _on_disk(shape, work, written),
        in_flight_bytes=load.in_flight if work.on_host else HOST_IN_FLIGHT,
        chains=min(batching.shards, work.num_workers // max(map(len, waves))),
        training_bytes=trained,
        training_workers=fewest,
    )


def _training(shape: ModelShape, form: ModelForm, work: Workload) -> tuple[dict[str, int], int]:
    """Return the peak of a worker that trains the whole result, by kind, and the fewest workers.

    Empty and 1 where none is trained.

    Raises:
        PlanError: it does not fit the workers.
    """
    how = work.recovery
    if how is None or how.mode != "global":
        return {}, 1
    room = Room(work.batching.dtype, worker_bytes=work.worker_bytes, num_workers=work.num_workers)
    return trainers(shape, form, how, room)


def _on_disk(shape: ModelShape, work: Workload, written: int) -> int:
    """Return the bytes of a recovery on disk at its peak, beside the result.

    The model before and after it; and checkpoints, or the activations between all layers.
    """
    how = work.recovery
    if how is None:
        return 0
    stream = how.data_tokens * shape.hidden * BYTES_OF[work.batching.dtype]
    own = CHECKPOINTS * written if how.mode == "global" else (shape.num_layers + 1) * stream
    return 2 * written + own


def _require_possible(
    shape: ModelShape,
    spec: MethodSpec,
    options: Mapping[str, Option],
    *,
    target: Target,
    work: Workload,
    others: Sequence[tuple[MethodSpec, Mapping[str, Option]]],
) -> None:
    reason = spec.refuses(shape, options)
    if reason:
        able = [each.name for each, given in others if not each.refuses(shape, given)]
        hint = f"methods that do: {', '.join(able)}" if able else ""
        raise PlanError(f"{spec.name} does not support this model: {reason}", hint=hint)
    _require_size(spec, options, target)
    if options.get("refit") and work.batching.sequences < refit.MIN_SEQUENCES:
        raise PlanError(
            f"refit: {work.batching.sequences} calibration sequence is too few: some are held out",
            hint=f"use --calibration-sequences {refit.MIN_SEQUENCES} or more",
        )


def _require_size(spec: MethodSpec, options: Mapping[str, Option], target: Target) -> None:
    """Check that what is asked of the result can be asked of the method."""
    if spec.quantises and (target.slice is not None or target.keep_fraction not in (None, 1.0)):
        asked = "slice" if target.slice is not None else "keep_fraction"
        raise PlanError(
            f"{asked}: {spec.name} removes no parameters; it stores them in fewer bits",
            hint="use --option bits=4, --bits 4.2 or --keep-bytes 4GB; or a step of another method "
            "before it",
        )
    if target.slice is not None and not spec.residual:
        raise PlanError(
            f"slice: {target.slice} is a fraction of the residual width, which {spec.name} keeps",
            hint="use --keep-fraction, the true fraction of the parameters",
        )
    counts_bits = target.keep_bytes is not None or target.bits is not None
    if SCHEMES.name in options and not counts_bits and target.fit is None:
        raise PlanError(
            f"options.{SCHEMES.name}: are chosen by what they save, so the size must be in bytes "
            "or bits",
            hint="use --keep-bytes, --bits or --fit"
            + " instead of --keep-fraction" * (target.keep_fraction is not None),
        )
    if counts_bits and spec.allocate is None:
        raise PlanError(
            f"keep_bytes, bits: {spec.name} does not choose widths by measured damage",
            hint="use --method modegpt or gptq, or --keep-fraction",
        )
    if target.speedup is not None and not spec.cuts_widths:
        raise PlanError(
            f"speedup: {spec.name} has no widths whose times are measured one by one",
            hint="use --method modegpt, or --keep-fraction",
        )


def _load(
    shape: ModelShape,
    spec: MethodSpec,
    options: Mapping[str, Option],
    *,
    form: ModelForm,
    start: Start,
    work: Workload,
) -> Load:
    batching = work.batching
    step = Shrinking(
        shape=shape,
        form=form,
        spec=spec,
        options=options,
        tokens=(batching.microbatch_tokens, batching.tokens),
        sequence_length=batching.sequence_length,
        dtype=batching.dtype,
        start=start.form,
        mapped=work.mapped,
        recovery=work.recovery,
    )
    unit = unit_bytes(step)
    more = in_flight(step) if work.on_host else 0
    if unit + more + LIBRARIES > work.worker_bytes:
        more = 0  # units are read, computed and written one after the other
    load = load_of(
        shape,
        spec.statistics(shape, options) | work.extra_statistics,
        batching,
        unit=unit,
        in_flight=more,
        start=start.form,
        result=form,
    )
    exact = replace(batching, dtype=work.evaluation_dtype or batching.dtype)
    if BYTES_OF[exact.dtype] <= BYTES_OF[batching.dtype]:
        return load
    evaluation = load_of(shape, frozenset(), exact, start=start.form, result=form)
    return replace(load, evaluation=evaluation)


def _shortfall(
    shape: ModelShape, tried: Attempt, *, target: Target, work: Workload, start: Start
) -> int:
    """Return the bytes that a worker lacks for a changed version of the step.

    Raises:
        PlanError: the changed step cannot be planned at all.
    """
    if tried.spec.refuses(shape, tried.options):
        raise PlanError(f"{tried.spec.name} does not support this model")
    changed = replace(work, batching=tried.batching)
    form = tried.spec.form(shape, start, target, tried.options)
    load = _load(shape, tried.spec, tried.options, form=form, start=start, work=changed)
    return load.shortfall(tried.worker_bytes, num_layers=shape.num_layers)
