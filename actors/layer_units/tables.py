"""Units that write the embedding, the head and the final norm, in blocks of vocabulary rows."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from actors import methods
from actors.devices.transfer import to_device, to_host
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask
from actors.numerics.packing import parts_of
from actors.numerics.rounding import round_to_nearest, scale_dtype
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.prefetch import prefetched
from actors.storage.tensors import require_finite, write_rows, write_weights
from planners.families import load as load_family
from planners.model.scheme import Scheme
from planners.model.weight_files import weight_files

ROWS = 8192  # vocabulary rows that are in memory at one time
Rotate = Callable[[Tensor], Tensor]  # rows as they are read -> rows of the result


def embedding(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Write the embedding, and the table of learned positions."""
    family, checkpoint = load_family(job.shape.family), reads.checkpoint(job)
    bases = reads.bases(task.inputs, run) if _is_residual(job) else ()

    def rotate(rows: Tensor) -> Tensor:
        rows = to_device(rows, reads.device)
        if not bases:
            return rows
        rotated: Tensor = methods.load(job.method).apply_embedding(rows, bases[0], shape=job.shape)
        return rotated

    done = _write_table(("embedding", family.embedding), checkpoint, job, run, rotate)
    if not job.form.positions:
        return done
    rows = checkpoint.read(family.positions)
    return _with(done, "positions", {family.positions: rotate(rows)}, job, run)


def head(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Write the head, unless it is the embedding's tensor, its bias, and the final norm."""
    family, checkpoint = load_family(job.shape.family), reads.checkpoint(job)
    bases = reads.bases(task.inputs, run) if _is_residual(job) else ()
    norm = {}  # folded into the head by a step before
    for name in family.norm_tensors(job.shape) if checkpoint.form.head_norm_weight else ():
        norm[name] = checkpoint.read(name).to(reads.device)
    moved = _MovedBias(job, norm.get(family.norm_bias) if bases else None)

    def rotate(rows: Tensor) -> Tensor:
        rows = to_device(rows, reads.device)
        if not bases:
            return rows
        moved.add(rows)
        rotated: Tensor = methods.load(job.method).apply_head(
            rows,
            bases[-1],
            shape=job.shape,
            norm_weight=norm.get(family.final_norm),
            native=job.form.native,
        )
        return rotated

    done: Done = ((), {})
    if not job.form.tied:
        source = family.head_among(checkpoint.locations)
        done = _write_table(("head", source), checkpoint, job, run, rotate)
    small = _small(job, checkpoint, bases, norm)
    if job.form.head_bias:
        stored = checkpoint.read(family.head_bias) if checkpoint.form.head_bias else None
        small[family.head_bias] = moved.result(stored)
    return _with(done, "norm", small, job, run) if small else done


def _small(
    job: CompressionJob,
    checkpoint: Checkpoint,
    bases: tuple[Tensor, ...],
    norm: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return the final norm and the head's shortcut, where the result has them."""
    family = load_family(job.shape.family)
    small: dict[str, Tensor] = {}
    if job.form.head_norm_weight:
        small = dict(norm)
        if bases:  # the scale is folded into the head
            dtype = norm[family.final_norm].dtype
            small = {family.final_norm: torch.ones(job.form.head_dim, dtype=dtype)}
    if job.form.head_shortcut:
        small[family.head_shortcut] = _shortcut(job, checkpoint, bases, norm)
    return small


def _shortcut(
    job: CompressionJob,
    checkpoint: Checkpoint,
    bases: tuple[Tensor, ...],
    norm: dict[str, Tensor],
) -> Tensor:
    """Return the matrix between the final norm and a tied head; that of a former step if any."""
    family = load_family(job.shape.family)
    if not bases:
        return checkpoint.read(family.head_shortcut)
    found: Tensor = methods.load(job.method).head_shortcut(
        bases[0], bases[-1], shape=job.shape, norm_weight=norm.get(family.final_norm)
    )
    return found.to(getattr(torch, job.shape.dtype))


class _MovedBias:
    """The bias of the head, to which that of the final norm is added block by block."""

    def __init__(self, job: CompressionJob, norm_bias: Tensor | None) -> None:
        self._method, self._norm_bias = methods.load(job.method), norm_bias
        self._dtype = getattr(torch, job.shape.dtype)
        self._blocks: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add the rows of the head that follow."""
        if self._norm_bias is not None:
            self._blocks.append(self._method.head_bias(rows, self._norm_bias).cpu())

    def result(self, stored: Tensor | None) -> Tensor:
        """Return the bias of the result, given that of the input."""
        if not self._blocks:
            assert stored is not None  # a head gets a bias only from itself or the norm
            return stored
        moved = torch.cat(self._blocks)
        return (moved if stored is None else moved + stored.to(torch.float64)).to(self._dtype)


def _with(
    done: Done, part: str, tensors: dict[str, Tensor], job: CompressionJob, run: Directory
) -> Done:
    """Return the files and values of a unit that also writes these small tensors."""
    files, values = done
    dtype = getattr(torch, job.form.dtype or job.shape.dtype)
    kept = {name: tensor.cpu().to(dtype).contiguous() for name, tensor in tensors.items()}
    name = f"{job.folder}{weight_files(job.form)[part]}"
    for tensor in kept.values():
        require_finite(tensor)
    file, facts = write_weights(run, name, kept)
    known = values.get("tensors", {})
    assert isinstance(known, dict)  # written by _write_table
    return (*files, file), {**values, "tensors": {**known, **facts}}


def _is_residual(job: CompressionJob) -> bool:
    return methods.spec(job.method).residual


def _write_table(
    table: tuple[str, str],
    checkpoint: Checkpoint,
    job: CompressionJob,
    run: Directory,
    rotate: Rotate,
) -> Done:
    """Write the embedding or the head, which ``table`` says, from the tensor named beside it."""
    role, source = table
    family, form = load_family(job.shape.family), job.form
    target, width = {
        "embedding": (family.embedding, form.embedding_dim),
        "head": (family.head, form.head_dim),
    }[role]
    dtype = getattr(torch, form.dtype or job.shape.dtype)
    rows = prefetched(checkpoint.read_blocks(source, rows=ROWS))
    name = f"{job.folder}{weight_files(job.form)[role]}"
    shape = (job.shape.vocab_size, width)
    if (scheme := form.tables.get(role)) is not None:
        parts = _quantised((rotate(block) for block in rows), scheme, shape, dtype)
        module = target.removesuffix("weight")
        entry, known = write_weights(run, name, {module + part: t for part, t in parts.items()})
        return (entry,), {"tensors": known}
    blocks = (to_host(rotate(block).to(dtype)) for block in rows)
    entry, facts = write_rows(run, name, target, blocks, shape=shape)
    return (entry,), {"tensors": {target: facts}}


def _quantised(
    blocks: Iterable[Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the parts of a table at the nearest values of its grid, on the host."""
    found: dict[str, list[Tensor]] = {}
    for block in blocks:
        require_finite(block)
        every = torch.ones(block.shape[1], device=block.device)
        rounded = round_to_nearest(block, every, scheme, stored=scale_dtype(dtype))
        for part, tensor in parts_of(rounded, scale_dtype(dtype)).items():
            found.setdefault(part, []).append(to_host(tensor))
    parts = {part: torch.cat(tensors) for part, tensors in found.items()}
    return {**parts, "weight_shape": torch.tensor(shape)}
