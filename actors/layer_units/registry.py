"""Kind of unit -> the function that does it: it reads files, computes and writes files."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from actors.layer_units import refit, sequential_slicing
from actors.layer_units.basis import basis, basis_sequential
from actors.layer_units.damage import damage
from actors.layer_units.layer import choose_refit, layer, truncation_losses
from actors.layer_units.rotated_statistics import rotate_statistics
from actors.layer_units.tables import embedding, head
from actors.messages import OF_A_LAYER, CompressionJob, Done, UnitTask
from actors.statistics.sums import add_shards
from actors.storage.files import Directory
from planners.errors import NumericsError
from planners.overflow import found_behind


def do_unit(task: UnitTask, job: CompressionJob, *, run: Directory, device: str) -> Done:
    """Do one unit; return its files and the values of its record.

    Raises:
        NumericsError: statistics gave no usable numbers.
        ModelError: a weight is missing or not finite.
    """
    own = job.layer_options.get(task.index)
    if own and task.kind in OF_A_LAYER:
        job = replace(job, options={**job.options, **own})
    try:
        return KINDS[task.kind](task, job, run, device)
    except NumericsError as error:
        said = NumericsError(f"{task.unit}: {error}", hint=error.hint)
        raise found_behind(said, job.batching.dtype) from error


KINDS: Mapping[str, Callable[[UnitTask, CompressionJob, Directory, str], Done]] = {
    "statistics": add_shards,
    "basis": basis,
    "basis_shared": basis,
    "basis_sequential": basis_sequential,
    "damage": damage,
    "losses": truncation_losses,
    "carried": rotate_statistics,
    "layer": layer,
    "draft": layer,
    "chosen": choose_refit,
    **refit.KINDS,
    **sequential_slicing.KINDS,
    "embedding": embedding,
    "head": head,
}
