"""Units that write the embedding, the head and the final norm, in blocks of vocabulary rows."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from actors import methods
from actors.layer_units.layer import read_bases
from actors.messages import CompressionJob, Done, UnitTask
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory, FileEntry
from actors.storage.tensors import (
    NAME_OF,
    described,
    require_finite,
    tensor_bytes,
    write_rows,
    write_tensors,
)
from planners.families import load as load_family
from planners.model.weight_files import weight_files

ROWS = 8192  # vocabulary rows that are in memory at one time
Rotate = Callable[[Tensor], Tensor]  # rows as they are read -> rows of the result


def embedding(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Write the embedding."""
    family = load_family(job.shape.family)
    bases = read_bases(task.inputs, run, device) if _is_residual(job) else ()

    def rotate(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        return methods.load(job.method).apply_embedding(rows, bases[0]) if bases else rows

    return _write_table("embedding", family.embedding, job, run, rotate)


def head(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Write the head, unless it is the embedding's tensor, and the final norm."""
    family = load_family(job.shape.family)
    checkpoint = Checkpoint.of(job)
    norm_weight = None  # folded into the head by a step before
    if checkpoint.form.head_norm_weight:
        norm_weight = checkpoint.read(family.final_norm).to(device)
    bases = read_bases(task.inputs, run, device) if _is_residual(job) else ()

    def rotate(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        if not bases:
            return rows
        rotated: Tensor = methods.load(job.method).apply_head(
            rows, bases[-1], norm_weight=norm_weight, native=job.form.native
        )
        return rotated

    files: tuple[FileEntry, ...] = ()
    values: dict[str, object] = {}
    if not job.form.tied:
        source = family.head_among(checkpoint.locations)
        files, values = _write_table("head", source, job, run, rotate)
    if norm_weight is not None and job.form.head_norm_weight:
        scale = norm_weight if not bases else torch.ones(job.form.head_dim, dtype=norm_weight.dtype)
        tensors = {family.final_norm: scale.cpu()}
        name = f"model/{weight_files(job.form)['norm']}"
        norm_file = write_tensors(run, name, tensors, metadata={"format": "pt"})
        facts = {k: described(t) for k, t in tensors.items()}
        known = values.get("tensors", {})
        assert isinstance(known, dict)  # written by _write_table
        files, values = (*files, norm_file), {"tensors": {**known, **facts}}
    return files, values


def _is_residual(job: CompressionJob) -> bool:
    return methods.spec(job.method).residual


def _write_table(
    role: str, source: str, job: CompressionJob, run: Directory, rotate: Rotate
) -> Done:
    """Write the embedding or the head, which ``role`` says, from the tensor ``source``."""
    family, form = load_family(job.shape.family), job.form
    target, width = {
        "embedding": (family.embedding, form.embedding_dim),
        "head": (family.head, form.head_dim),
    }[role]
    checkpoint = Checkpoint.of(job)
    num_rows = job.shape.vocab_size
    digest = hashlib.sha256()
    dtypes = set()

    def blocks() -> Iterator[Tensor]:
        for rows in checkpoint.read_blocks(source, rows=ROWS):
            block = rotate(rows).cpu()
            require_finite(block)
            digest.update(tensor_bytes(block))
            dtypes.add(NAME_OF[block.dtype])
            yield block

    name = f"model/{weight_files(job.form)[role]}"
    entry = write_rows(run, name, target, blocks(), shape=(num_rows, width))
    facts = {"sha256": digest.hexdigest(), "shape": [num_rows, width], "dtype": dtypes.pop()}
    return (entry,), {"tensors": {target: facts}}
