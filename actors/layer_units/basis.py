"""Units that find the basis of a site of the residual stream from its Gram matrix."""

from torch import Tensor

from actors import methods
from actors.devices.transfer import to_host
from actors.layer_units import sequential_slicing
from actors.layer_units.reads import Reads, site_statistic
from actors.messages import CompressionJob, Done, UnitTask, Unwritten
from actors.storage.files import Directory
from actors.storage.tensors import write_tensors
from planners.model.form import site_dims

SPECTRUM_SAMPLES = 256  # most eigenvalues of a site that its record holds


def basis(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Unwritten:
    """Factor the gram of one site, or those of all sites into one shared basis (index -1)."""
    sites = [*site_dims(job.form)] if task.index < 0 else [task.index]
    grams = [gram for site in sites if (gram := _site_gram(site, job, reads)) is not None]
    return _factored(grams, task, job, run)


def basis_sequential(
    task: UnitTask, job: CompressionJob, run: Directory, reads: Reads
) -> Unwritten:
    """Factor the gram of one site, as observed after layers that are already sliced."""
    gram = sequential_slicing.site_gram(task.index, job=job, run=run, device=reads.device)
    return _factored([gram], task, job, run)


def _factored(
    grams: list[Tensor], task: UnitTask, job: CompressionJob, run: Directory
) -> Unwritten:
    where = f"site {task.index}" if task.index >= 0 else "all sites"
    keep_dim = site_dims(job.form)[max(task.index, 0)]
    centred = job.shape.is_centred
    found = methods.load(job.method).factor(grams, keep_dim=keep_dim, where=where, centred=centred)
    tensors = {"vectors": to_host(found.vectors), "values": to_host(found.values)}
    step = max(1, -(-len(found.values) // SPECTRUM_SAMPLES))
    values = {
        "energy_kept": found.energy_kept,
        "rung": found.rung,
        "dim": len(found.vectors),
        "keep_dim": keep_dim,
        "eigenvalues": [float(v) for v in found.values[::step]],
    }

    def write() -> Done:
        return (write_tensors(run, f"basis/{task.unit}.safetensors", tensors),), values

    return Unwritten(held=sum(tensor.nbytes for tensor in tensors.values()), write=write)


def _site_gram(site: int, job: CompressionJob, reads: Reads) -> Tensor | None:
    """Return the gram of a site, on the device; None where the method does not observe it."""
    found = site_statistic(site, job)
    return reads.statistic(job, *found) if found is not None else None
