"""Kind of unit -> the function that does it: it reads files, computes and writes files."""

from collections.abc import Callable
from dataclasses import replace

from actors.layer_units import recovery, refit, sequential_slicing
from actors.layer_units.basis import basis, basis_sequential
from actors.layer_units.carried_statistics import carry_statistics
from actors.layer_units.damage import damage
from actors.layer_units.layer import choose_refit, layer, truncation_losses
from actors.layer_units.reads import Reads
from actors.layer_units.tables import embedding, head
from actors.layer_units.times import times
from actors.messages import CompressionJob, Done, UnitTask, Unwritten
from actors.statistics.sums import add_shards
from actors.storage.files import Directory
from planners.errors import NumericsError
from planners.overflow import found_behind
from planners.units.kinds import KINDS


def do_unit(task: UnitTask, job: CompressionJob, *, run: Directory, reads: Reads) -> Done:
    """Do one unit; return its files and the values of its record.

    Raises:
        CompressionError: see `compute_unit`; or a file cannot be written.
    """
    return compute_unit(task, job, run=run, reads=reads).write()


def compute_unit(task: UnitTask, job: CompressionJob, *, run: Directory, reads: Reads) -> Unwritten:
    """Do one unit but for the files that it can leave to be written while the next one computes.

    Raises:
        NumericsError: statistics gave no usable numbers.
        ModelError: a weight is missing or not finite.
    """
    own = job.layer_options.get(task.index)
    if own and KINDS[task.kind].own_options:
        job = replace(job, options={**job.options, **own})
    try:
        found = FUNCTIONS[task.kind](task, job, run, reads)
    except NumericsError as error:
        said = NumericsError(f"{task.unit}: {error}", hint=error.hint)
        raise found_behind(said, job.batching.dtype) from error
    return found if isinstance(found, Unwritten) else Unwritten(held=0, write=lambda: found)


# One a kind of unit that a worker does by itself; `planners.units.kinds` says all else of it.
FUNCTIONS: dict[str, Callable[[UnitTask, CompressionJob, Directory, Reads], Done | Unwritten]] = {
    "statistics": add_shards,
    "basis": basis,
    "basis_shared": basis,
    "basis_sequential": basis_sequential,
    "times": times,
    "damage": damage,
    "losses": truncation_losses,
    "carried": carry_statistics,
    "layer": layer,
    "draft": layer,
    "chosen": choose_refit,
    "refit_start": refit.start,
    "refit_layer": refit.layer,
    "refit_losses": refit.losses,
    "stream": sequential_slicing.stream,
    "embedding": embedding,
    "head": head,
    "inputs": recovery.inputs,
    "recover_layer": recovery.layer,
    "export_layer": recovery.export,
    "export_embedding": recovery.export,
    "export_head": recovery.export,
    "kept_layer": recovery.keep,
    "kept_embedding": recovery.keep,
    "kept_head": recovery.keep,
}
