"""Symmetric matrices, packed as their upper triangle (see `planners.model.packing`) or full.

A Gram matrix of the FFN of a 70B model takes 6.6 GB in float64: memory suffices for one, in which
it is factored. So a matrix is kept packed, possibly in a memory-mapped file, and code that needs
the full matrix gets it in new memory that it may overwrite. Of a full matrix only the upper
triangle is read.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planners.model.packing import Block, blocks_of, dim_of_packed, packed_elements

Symmetric = Float[Tensor, "dim dim"] | Float[Tensor, " packed"]


def zeros(dim: int, *, device: str) -> Float[Tensor, " packed"]:
    """Return a packed matrix of zeros, in float64."""
    return torch.zeros(packed_elements(dim), dtype=torch.float64, device=device)


def width(matrix: Symmetric) -> int:
    """Return the number of rows of the matrix."""
    return len(matrix) if matrix.ndim > 1 else dim_of_packed(len(matrix))


def blocks(matrix: Symmetric) -> Iterator[tuple[Block, Float[Tensor, "rows columns"]]]:
    """Yield the blocks of rows of the upper triangle, as views."""
    for block in blocks_of(width(matrix)):
        if matrix.ndim > 1:
            yield block, matrix[block.first : block.last, block.first :]
        else:
            yield block, matrix[block.start : block.stop].view(block.shape)


def packed(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, " packed"]:
    """Return the upper triangle of a full symmetric matrix."""
    return torch.cat([rows.flatten() for _, rows in blocks(matrix)])


def diagonal(matrix: Symmetric) -> Float[Tensor, " dim"]:
    """Return the diagonal, in float64."""
    return torch.cat([rows.diagonal() for _, rows in blocks(matrix)]).to(torch.float64)


def all_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite, without a mask of the tensor's size."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # both are NaN where any entry is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def unpacked(matrix: Symmetric) -> Float[Tensor, "dim dim"]:
    """Return the full matrix in float64, exactly symmetric, in new memory."""
    dim = width(matrix)
    full = torch.empty(dim, dim, dtype=torch.float64, device=matrix.device)
    for block, rows in whole_blocks(matrix):
        full[block.first : block.last, block.first :] = rows
        full[block.first :, block.first : block.last] = rows.T
    return full


def permuted(matrix: Symmetric, order: Int[Tensor, " dim"]) -> Float[Tensor, "dim dim"]:
    """Return the lower triangle of ``matrix[order][:, order]`` in float64, zeros above it."""
    dim = width(matrix)
    full = torch.zeros(dim, dim, dtype=torch.float64, device=matrix.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(dim, device=order.device)
    for block, rows in whole_blocks(matrix):
        down, across = place[block.first : block.last, None], place[None, block.first :]
        full[torch.maximum(down, across), torch.minimum(down, across)] = rows
    return full


def submatrix(matrix: Symmetric, kept: Int[Tensor, " keep"]) -> Float[Tensor, "keep keep"]:
    """Return ``matrix[kept][:, kept]`` in float64, without a full copy of the matrix.

    Args:
        matrix: symmetric.
        kept: rows and columns, ascending.
    """
    full = torch.empty(len(kept), len(kept), dtype=torch.float64, device=matrix.device)
    for block, rows in whole_blocks(matrix):
        own = (kept >= block.first) & (kept < block.last)
        down, right = kept[own] - block.first, kept[kept >= block.first] - block.first
        if not len(down):
            continue
        part = rows[down][:, right]
        at = int((kept < block.first).sum())
        full[at : at + len(down), at:] = part
        full[at:, at : at + len(down)] = part.T
    return full


def congruence(weight: Float[Tensor, "out dim"], matrix: Symmetric) -> Float[Tensor, "out out"]:
    """Return ``W C W^T`` in float64, exactly symmetric, without a full copy of C.

    Args:
        weight: float64.
        matrix: C.
    """
    half = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
    for block, rows in whole_blocks(matrix):
        rows[:, : len(rows)] /= 2  # the square on the diagonal is in both halves
        right = rows @ weight[:, block.first :].T  # (rows, out)
        half.addmm_(weight[:, block.first : block.last], right)
    return half + half.T


def whole_blocks(matrix: Symmetric) -> Iterator[tuple[Block, Float[Tensor, "rows columns"]]]:
    """Yield copies of the blocks in float64, with the square on the diagonal mirrored."""
    for block, rows in blocks(matrix):
        copy = rows.to(torch.float64, copy=True)
        square = copy[:, : len(copy)]
        square.copy_(square.triu() + square.triu(1).T)
        yield block, copy
