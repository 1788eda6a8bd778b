"""Validate a file of statistics: finite sums and symmetric Gram matrices.

A gram with one axis is packed (`planners.model.packing`); older files have full ones, with two.
"""

import torch
from torch import Tensor

from actors.storage.files import Directory
from actors.storage.headers import TensorEntry
from actors.storage.tensors import read_header, read_tensor
from planners.errors import StorageError
from planners.model.packing import blocks_of, dim_of_packed

BLOCK_BYTES = 128 * 2**20  # of a gram per block; two blocks are in memory at a time
# Products are computed in float32, where (i, j) and (j, i) may be rounded differently.
ASYMMETRY = 1e-5  # relative to the square root of the product of both diagonal entries


def check_sums(directory: Directory, name: str, *, num_tokens: int) -> None:
    """Check that every sum in a file is finite and every gram symmetric with a diagonal >= 0.

    A large gram is read in blocks of rows; it is never fully in memory.

    Raises:
        StorageError: a check fails; the message names the file and the statistic.
        ModelError: it is not a safetensors file.
    """
    for key, entry in read_header(directory, name).items():
        where = f"{directory.path(name)}: {key}"
        if key == "num_tokens":
            found = int(read_tensor(directory, name, entry)[0])
            if found != num_tokens:
                raise StorageError(f"{where} is {found}, but its record has {num_tokens}")
        elif key.endswith("gram") and len(entry.shape) == 1:
            _check_packed(directory, name, entry, where)
        elif key.endswith("gram") and len(entry.shape) == 2:  # noqa: PLR2004 a matrix
            _check_large(directory, name, entry, where)
        else:
            tensor = read_tensor(directory, name, entry)
            _require_finite(tensor, where)
            if key.endswith("gram"):
                diagonal = tensor.diagonal(dim1=-2, dim2=-1)
                _check_block(tensor, tensor.transpose(-2, -1), diagonal, diagonal, where)


def _check_packed(directory: Directory, name: str, entry: TensorEntry, where: str) -> None:
    try:
        dim = dim_of_packed(entry.shape[0])
    except ValueError as error:
        raise StorageError(f"{where}: {error}") from error
    for block in blocks_of(dim):
        rows = read_tensor(directory, name, entry, rows=(block.start, block.stop))
        _require_finite(rows, where)
        square = rows.view(block.shape)[:, : block.shape[0]]
        _check_block(square, square.T, square.diagonal(), square.diagonal(), where)


def _check_large(directory: Directory, name: str, entry: TensorEntry, where: str) -> None:
    dim = entry.shape[0]
    step = max(1, BLOCK_BYTES * dim // max(entry.size, 1))
    spans = [(start, min(start + step, dim)) for start in range(0, dim, step)]
    diagonals = []
    for first, last in spans:
        rows = read_tensor(directory, name, entry, rows=(first, last))
        _require_finite(rows, where)
        diagonals.append(rows[:, first:last].diagonal().clone())
        for (a, b), diagonal in zip(spans, diagonals, strict=False):
            others = rows if a == first else read_tensor(directory, name, entry, rows=(a, b))
            _check_block(rows[:, a:b], others[:, first:last].T, diagonals[-1], diagonal, where)


def _check_block(
    block: Tensor, mirrored: Tensor, rows: Tensor, columns: Tensor, where: str
) -> None:
    """Compare a block of a gram with its mirror image.

    ``rows`` and ``columns`` are the diagonal entries of the gram for the rows and columns of the
    block. All arguments may have a leading axis, such as one gram per head.
    """
    if bool((rows < 0).any()):
        raise StorageError(f"{where} has a negative sum of squares on its diagonal")
    scale = (rows[..., :, None] * columns[..., None, :]).sqrt()
    if bool(((block - mirrored).abs() > ASYMMETRY * scale).any()):
        raise StorageError(f"{where} is not symmetric")


def _require_finite(tensor: Tensor, where: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise StorageError(f"{where} has entries that are NaN or infinite")
