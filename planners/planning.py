"""Model, method, target and workers -> the plan of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planners import refit
from planners.cost import (
    BYTES_OF,
    dense_parameters,
    forward_flops,
    gram_flops,
    model_parameters,
    statistic_elements,
)
from planners.errors import PlanError
from planners.placement import load_of, place
from planners.plan import MethodSpec, ModelShape, Option, RunPlan, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much data passes the model, in which pieces, on how many workers.

    Attributes:
        sequences: of calibration.
        sequence_length: tokens of each.
        microbatch_sequences: sequences that go through a stage in one call.
        compute_dtype: of the forward pass.
        statistics_dtype: of grams on disk.
        num_workers: workers at hand.
        worker_bytes: memory of each.
    """

    sequences: int
    sequence_length: int
    microbatch_sequences: int
    compute_dtype: str
    num_workers: int
    worker_bytes: int
    statistics_dtype: str = "float64"


def make_plan(
    shape: ModelShape,
    spec: MethodSpec,
    options: Mapping[str, Option],
    *,
    target: Target,
    work: Workload,
) -> RunPlan:
    """Return the plan: widths, stages, waves, bytes and operations, from integers alone.

    Raises:
        PlanError: the method refuses the model, the target is out of reach, or a layer does not
            fit a worker.
    """
    reason = spec.refuses(shape, options)
    if reason:
        raise PlanError(f"{spec.name} cannot take this model: {reason}")
    if target.slice is not None and not spec.residual:
        raise PlanError(
            f"slice: is {target.slice}, a fraction of the residual width, which {spec.name} keeps",
            hint="use --keep-fraction, the true fraction of the parameters",
        )
    form = spec.form(shape, target, options)
    statistics = spec.statistics(options)
    tokens = work.sequences * work.sequence_length
    load = load_of(
        shape,
        statistics,
        microbatch_tokens=work.microbatch_sequences * work.sequence_length,
        compute_dtype=work.compute_dtype,
    )
    refitted = bool(options.get("refit"))
    if refitted:
        if work.sequences < refit.MIN_SEQUENCES:
            raise PlanError(
                f"refit: {work.sequences} calibration sequence is too few; some are held out",
                hint=f"use --calibration-sequences {refit.MIN_SEQUENCES} or more",
            )
        more = refit.workspace_bytes(shape, layer_bytes=load.layer)
        load = replace(load, workspace=load.workspace + more)
    waves = place(shape, load, num_workers=work.num_workers, worker_bytes=work.worker_bytes)
    before, after = dense_parameters(shape), model_parameters(shape, form)
    width = BYTES_OF[shape.dtype]
    stored = BYTES_OF[work.statistics_dtype]
    sums = sum(statistic_elements(shape, s) for s in statistics) * stored * shape.num_layers
    # A chain of sites keeps the stream it reads and the one it writes.
    sequential = options.get("schedule") == "sequential"
    streams = 2 if sequential else int(len(waves) > 1)
    boundaries = streams * tokens * shape.hidden * BYTES_OF[work.compute_dtype]
    if sequential:  # a gram for each shard of a site
        boundaries += int(options["shards"]) * shape.hidden**2 * 8
    drafts = 0
    if refitted:
        stream = tokens * shape.hidden * BYTES_OF[work.compute_dtype]
        drafts = refit.disk_bytes(after * width, stream_bytes=stream)
    bases = 0
    if spec.residual:
        dims = [d for layer in form.layers for d in (layer.residual_in, layer.residual_mid)]
        bases = sum(dims) * shape.hidden * 8
    return RunPlan(
        shape=shape,
        form=form,
        waves=waves,
        parameters_before=before,
        parameters_after=after,
        bytes_before=before * width,
        bytes_after=after * width,
        calibration_tokens=tokens,
        calibration_flops=forward_flops(shape, tokens=tokens, sequence_length=work.sequence_length)
        + gram_flops(shape, statistics, tokens=tokens),
        worker_bytes=max(sum(stage.bytes.values()) for wave in waves for stage in wave),
        disk_bytes=after * width + sums + boundaries + bases + drafts,
    )
