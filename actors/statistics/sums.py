"""Write the sums of a layer to a file; add the sums of several shards."""

from collections.abc import Mapping

import torch
from torch import Tensor

from actors.messages import CompressionJob, Done, UnitTask
from actors.statistics.observe import added, summary
from actors.storage.files import Directory, FileEntry
from actors.storage.records import read_record
from actors.storage.tensors import map_tensors, write_tensors
from planners.model.statistic_kinds import KINDS


def write_sums(
    run: Directory, task: UnitTask, tensors: Mapping[str, Tensor], *, dtype: str
) -> FileEntry:
    """Write the sums of one layer.

    Args:
        run: the run directory.
        task: of kind ``shard`` for sums over a part of the tokens.
        tensors: as `LayerStatistics.tensors` returns them.
        dtype: of grams in the file; other sums keep their dtype.
    """
    name = f"stats/layer-{task.index:05d}" if task.kind == "statistics" else f"shards/{task.unit}"
    stored = {
        key: getattr(torch, dtype)
        for key in tensors
        if (kind := key.rpartition(".")[2]) in KINDS and KINDS[kind].packed  # only these are large
    }
    return write_tensors(run, f"{name}{task.suffix}.safetensors", tensors, stored=stored)


def add_shards(task: UnitTask, job: CompressionJob, run: Directory, reads: object) -> Done:
    """Add the sums of all shards of a layer, in order."""
    del reads  # files are added on the host
    records = [read_record(run, name) for name in task.inputs]
    taps = sorted(set.intersection(*(_taps(record.values) for record in records)))
    parts = (
        {k: t for file in record.files for k, t in map_tensors(run, file).items()}
        for record in records
    )
    tensors = added(parts, taps)
    entry = write_sums(run, task, tensors, dtype=job.statistics_dtype)
    return (entry,), summary(tensors, taps)


def _taps(values: Mapping[str, object]) -> set[str]:
    taps = values["taps"]
    assert isinstance(taps, list | tuple)  # written by a stage
    return set(taps)
