"""Units that make one layer of the result."""

from collections.abc import Mapping

import torch
from torch import Tensor

from actors import methods
from actors.devices.transfer import to_host
from actors.layer_units import mixed_methods
from actors.layer_units.damage import halved_layer
from actors.layer_units.reads import Reads
from actors.layer_units.sharing import SharingLayers
from actors.messages import CompressionJob, Done, UnitTask, Unwritten
from actors.methods._neighbours import Neighbours
from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.tensors import (
    CHECKPOINT_METADATA,
    read_tensors,
    require_finite,
    write_tensors,
    write_weights,
)
from planners.budget.schemes import QUANTISER
from planners.budget.served import PAIR_SCALES
from planners.families import load as load_family
from planners.method import Option
from planners.model.form import LayerForm
from planners.model.weight_files import weight_files

Tensors = dict[str, Tensor]


def layer(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Unwritten:
    """Compress one layer; write it into the result, or as a draft that is refitted later."""
    form = job.form.layers[task.index]
    weights = reads.weights(job, task.index)
    method = methods.load(job.method)
    if methods.spec(job.method).residual:
        bases = reads.bases(task.inputs, run)
        sites = (bases[0], bases[len(bases) // 2], bases[-1])
        new = method.apply(weights, sites, shape=job.shape, form=form)
        sums: Tensors = {}
        values: dict[str, object] = {}
    else:
        sums = reads.statistics(job, task.index)
        neighbours = SharingLayers(task.index, job, run, reads, inputs=task.inputs)
        new, sums, values = cut(weights, sums, job, task.index, reads, neighbours=neighbours)
    new, values = quantise(new, sums, values, job=job, form=form)
    named = named_below(new, job, task.index)
    name = f"draft/layer-{task.index:05d}.safetensors"
    if task.kind != "draft":
        name = f"{job.folder}{weight_files(job.form)[task.unit]}"

    def write() -> Done:
        entry, tensors = write_weights(run, name, named)
        return (entry,), {**values, "tensors": tensors}

    return Unwritten(held=sum(tensor.nbytes for tensor in named.values()), write=write)


def cut(  # noqa: PLR0913 a layer, before and after
    weights: Tensors,
    sums: Tensors,
    job: CompressionJob,
    index: int,
    reads: Reads,
    *,
    carry: bool = False,
    neighbours: Neighbours | None = None,
) -> tuple[Tensors, Tensors, dict[str, object]]:
    """Return a layer with the widths and ranks of the result, nothing of it quantised.

    Args:
        weights: role -> tensor of the layer.
        sums: its statistics.
        job: of the result.
        index: of the layer.
        reads: of this worker.
        carry: the Gram matrices behind the cut are wanted, though nothing is quantised.
        neighbours: the layers with which it shares tensors, for a method that does so.

    Returns:
        Its tensors by role, the sums of it that can be carried behind the cut, and the values of
        the method for its record.

    Raises:
        NumericsError: statistics gave no usable numbers.
    """
    spec, form = methods.spec(job.method), job.form.layers[index]
    if spec.quantises:
        return weights, sums, {}
    checkpoint = reads.checkpoint(job)
    start = checkpoint.form.layers[index]
    if form.pairs and not start.pairs:
        probe = sums["probe"]
        whole = halved_layer(weights, start, checkpoint=checkpoint, index=index, probe=probe)
        sums = {**sums, PAIR_SCALES: whole.score_scales(probe, form.pairs)}
    carried: Tensors | None = {} if carry or form.schemes else None
    if job.makers:
        new, values = mixed_methods.compress(
            weights, sums, job=job, index=index, start=start, form=form, carried=carried
        )
    else:
        # A method that leaves rounding to others need not know of it.
        more: dict[str, object] = {} if carried is None else {"carried": carried}
        if spec.shares:
            more["neighbours"] = neighbours
        new, values = methods.load(job.method).compress(
            weights, sums, shape=job.shape, form=form, options=job.options, **more
        )
    return new, {**sums, **(carried or {})}, values


def quantise(
    weights: Tensors,
    sums: Tensors,
    values: dict[str, object],
    *,
    job: CompressionJob,
    form: LayerForm,
) -> tuple[Tensors, dict[str, object]]:
    """Return a layer with the schemes and the dtype of the result, and the values for its record.

    Args:
        weights: as `cut` returns them.
        sums: likewise.
        values: of the cut, to which those of the rounding are added.
        job: of the result.
        form: of the layer.

    Raises:
        NumericsError: a Gram matrix is not finite, or not positive semi-definite.
    """
    dtype = getattr(torch, job.form.dtype or job.shape.dtype)
    whole = {
        name: tensor.to(dtype)
        for name, tensor in weights.items()
        if tensor.is_floating_point() and name.removesuffix(".weight") not in form.schemes
    }
    new = {**weights, **whole}
    if not form.schemes:
        return new, values
    own: Mapping[str, Option] = job.options if methods.spec(job.method).quantises else {}
    new, found = methods.load(QUANTISER).compress(
        new, sums, shape=job.shape, form=form, options=own, dtype=dtype
    )
    return new, {**values, "rounding": found}


def named_below(new: Tensors, job: CompressionJob, index: int) -> Tensors:
    """Return the tensors of a layer on the host, by their names in the result.

    Raises:
        NumericsError: one has an entry that is not finite.
    """
    family = load_family(job.shape.family)
    prefix = family.layer.format(i=index)
    named = {}
    for role, tensor in new.items():
        require_finite(tensor)  # on the device
        named[f"{prefix}.{family.below_layer(role)}"] = to_host(tensor)
    return named


def choose_refit(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Copy a layer into the result: as refitted if that model's loss is lower, else as drafted."""
    del reads
    draft, refitted, losses = (read_record(run, name).values for name in task.inputs)
    folder, tensors = "draft", draft["tensors"]
    if losses["used"]:
        folder, tensors = "refit", refitted["tensors"]
    named = read_tensors(run, f"{folder}/layer-{task.index:05d}.safetensors")
    name = f"{job.folder}{weight_files(job.form)[task.unit]}"
    entry = write_tensors(run, name, named, metadata=CHECKPOINT_METADATA)
    refit = {"used": losses["used"], "linears": refitted["linears"]}
    return (entry,), {**draft, "tensors": tensors, "refit": refit}


def truncation_losses(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Return the truncation error of each linear of a layer at the ranks of the job's form."""
    del run  # the job names the files of its statistics
    weights = reads.weights(job, task.index)
    sums = reads.statistics(job, task.index)
    form = job.form.layers[task.index]
    return (), {
        "losses": methods.load(job.method).losses(weights, sums, form=form, options=job.options)
    }
