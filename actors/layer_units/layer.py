"""Units that make one layer of the result, and what all units of a layer read."""

from collections.abc import Iterable

from torch import Tensor

from actors import methods
from actors.devices.transfer import to_device
from actors.layer_units import mixed_methods
from actors.messages import CompressionJob, Done, UnitTask
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.prefetch import prefetched
from actors.storage.records import read_record
from actors.storage.tensors import described, map_tensors, read_tensors, write_tensors
from planners.families import load as load_family
from planners.model.weight_files import weight_files


def layer(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Compress one layer; write it into the result, or as a draft that is refitted later."""
    checkpoint = Checkpoint.of(job)
    form = job.form.layers[task.index]
    weights = on_device(device, prefetched(checkpoint.stream_layer(task.index)))
    method = methods.load(job.method)
    if methods.spec(job.method).residual:
        bases = read_bases(task.inputs, run, device)
        sites = (bases[0], bases[len(bases) // 2], bases[-1])
        new = method.apply(weights, sites, shape=job.shape, form=form)
        values: dict[str, object] = {}
    else:
        sums = on_device(device, read_statistics(job, task.index).items())
        if job.makers:
            start = checkpoint.form.layers[task.index]
            new, values = mixed_methods.compress(
                weights, sums, job=job, index=task.index, start=start, form=form
            )
        else:
            new, values = method.compress(
                weights, sums, shape=job.shape, form=form, options=job.options
            )
    family = load_family(job.shape.family)
    prefix = family.layer.format(i=task.index)
    named = {f"{prefix}.{family.below_layer(role)}": t.cpu() for role, t in new.items()}
    name = f"draft/layer-{task.index:05d}.safetensors"
    if task.kind != "draft":
        name = f"model/{weight_files(job.form)[task.unit]}"
    entry = write_tensors(run, name, named, metadata={"format": "pt"})
    return (entry,), {**values, "tensors": {k: described(t) for k, t in named.items()}}


def choose_refit(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Copy a layer into the result: as refitted if that model's loss is lower, else as drafted."""
    del device
    draft, refitted, losses = (read_record(run, name).values for name in task.inputs)
    folder, tensors = "draft", draft["tensors"]
    if losses["used"]:
        folder, tensors = "refit", refitted["tensors"]
    named = read_tensors(run, f"{folder}/layer-{task.index:05d}.safetensors")
    name = f"model/{weight_files(job.form)[task.unit]}"
    entry = write_tensors(run, name, named, metadata={"format": "pt"})
    refit = {"used": losses["used"], "linears": refitted["linears"]}
    return (entry,), {**draft, "tensors": tensors, "refit": refit}


def truncation_losses(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Return the truncation error of each linear of a layer at the ranks of the job's form."""
    del run  # the job names the files of its statistics
    checkpoint = Checkpoint.of(job)
    weights = on_device(device, prefetched(checkpoint.stream_layer(task.index)))
    sums = on_device(device, read_statistics(job, task.index).items())
    form = job.form.layers[task.index]
    return (), {
        "losses": methods.load(job.method).losses(weights, sums, form=form, options=job.options)
    }


def on_device(device: str, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return named tensors on a device."""
    return {name: to_device(tensor, device) for name, tensor in named}


def read_statistics(job: CompressionJob, index: int) -> dict[str, Tensor]:
    """Return the sums of one layer: those of this run and of a run whose statistics it reuses.

    Grams are packed. Files on a local disk are mapped: they take no memory until a gram is unpacked
    to be factored.

    Raises:
        StorageError: a file is not as it was written.
    """
    found: dict[str, Tensor] = {}
    for uri, file in job.sums.get(index, ()):
        found |= map_tensors(Directory(uri), file)
    return found


def read_bases(names: tuple[str, ...], run: Directory, device: str) -> tuple[Tensor, ...]:
    """Return the bases that units wrote, on a device."""
    files = [file for name in names for file in read_record(run, name).files]
    return tuple(map_tensors(run, file)["vectors"].to(device) for file in files)
