"""Units that make one layer of the result."""

from actors import methods
from actors.devices.transfer import to_host
from actors.layer_units import mixed_methods
from actors.layer_units.damage import halved_layer
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask, Unwritten
from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.tensors import (
    CHECKPOINT_METADATA,
    read_tensors,
    require_finite,
    write_tensors,
    write_weights,
)
from planners.budget.served import PAIR_SCALES
from planners.families import load as load_family
from planners.model.weight_files import weight_files


def layer(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Unwritten:
    """Compress one layer; write it into the result, or as a draft that is refitted later."""
    form = job.form.layers[task.index]
    weights = reads.weights(job, task.index)
    method = methods.load(job.method)
    if methods.spec(job.method).residual:
        bases = reads.bases(task.inputs, run)
        sites = (bases[0], bases[len(bases) // 2], bases[-1])
        new = method.apply(weights, sites, shape=job.shape, form=form)
        values: dict[str, object] = {}
    else:
        sums = reads.statistics(job, task.index)
        checkpoint = reads.checkpoint(job)
        start = checkpoint.form.layers[task.index]
        if form.pairs and not start.pairs:
            probe = sums["probe"]
            whole = halved_layer(
                weights, start, checkpoint=checkpoint, index=task.index, probe=probe
            )
            sums = {**sums, PAIR_SCALES: whole.score_scales(probe, form.pairs)}
        if job.makers:
            new, values = mixed_methods.compress(
                weights, sums, job=job, index=task.index, start=start, form=form
            )
        else:
            new, values = method.compress(
                weights, sums, shape=job.shape, form=form, options=job.options
            )
    family = load_family(job.shape.family)
    prefix = family.layer.format(i=task.index)
    named = {}
    for role, tensor in new.items():
        require_finite(tensor)  # on the device
        named[f"{prefix}.{family.below_layer(role)}"] = to_host(tensor)
    name = f"draft/layer-{task.index:05d}.safetensors"
    if task.kind != "draft":
        name = f"model/{weight_files(job.form)[task.unit]}"

    def write() -> Done:
        entry, tensors = write_weights(run, name, named)
        return (entry,), {**values, "tensors": tensors}

    return Unwritten(held=sum(tensor.nbytes for tensor in named.values()), write=write)


def choose_refit(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Copy a layer into the result: as refitted if that model's loss is lower, else as drafted."""
    del reads
    draft, refitted, losses = (read_record(run, name).values for name in task.inputs)
    folder, tensors = "draft", draft["tensors"]
    if losses["used"]:
        folder, tensors = "refit", refitted["tensors"]
    named = read_tensors(run, f"{folder}/layer-{task.index:05d}.safetensors")
    name = f"model/{weight_files(job.form)[task.unit]}"
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
