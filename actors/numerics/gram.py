"""Sums over tokens, accumulated microbatch by microbatch.

A Gram matrix is the sum ``x^T x`` over tokens; as it is a sum and not a mean, the split of the
tokens over workers does not matter. The product of one microbatch is computed in float32 and
added to a float64 sum; products are summed in the order of the microbatches.
"""

from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from actors.numerics.packed import Symmetric, blocks

# Blocks of rows in one product on a GPU in half precision, where one does not fill all its cores.
# The plan counts a float32 copy of the tokens there, which is not made: it is larger.
BLOCKS = 4
HALVES = (torch.bfloat16, torch.float16)


def product(x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "dim dim"]:
    """Return ``x^T x`` of one microbatch in float32, accumulated in float32.

    A half-precision ``x`` is converted first, unless the device can multiply it into float32 as
    exactly (CUDA): a product rounded to half precision loses its small eigenvalues.
    """
    x = _to_product_dtype(x)
    return _product(x, x)


def _to_product_dtype(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype in which products are computed."""
    if x.dtype == torch.float64 or (x.is_cuda and x.dtype in HALVES):
        return x
    return x.to(torch.float32)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x.T, y, out_dtype=torch.float32) if x.dtype in HALVES else x.T @ y


def accumulate(total: Symmetric, x: Float[Tensor, "tokens dim"]) -> None:
    """Add the product of one microbatch to ``total``, in place, as a second copy may not fit.

    A packed total is updated a few blocks of rows at a time: half the work, no full-size product.
    """
    if total.ndim > 1:
        total.add_(product(x))
        return
    x = _to_product_dtype(x)
    add_blocks(total, x, at_once=BLOCKS if x.is_cuda and x.dtype in HALVES else 1)


def add_blocks(total: Float[Tensor, " packed"], x: Tensor, *, at_once: int) -> None:
    """Add ``x^T x`` to a packed total, so many blocks of rows by one product."""
    left = blocks(total)
    while several := list(islice(left, at_once)):
        first, last = several[0][0].first, several[-1][0].last
        found = _product(x[:, first:last], x[:, first:])
        for block, rows in several:
            rows.add_(found[block.first - first : block.last - first, block.first - first :])


def rms_normed(x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
    """Return each token divided by its root mean square; a zero token stays zero."""
    x32 = x.to(torch.float32)
    mean_square = x32.square().mean(dim=-1, keepdim=True)
    return x32 * torch.rsqrt(mean_square.clamp_min(torch.finfo(torch.float32).tiny))


def symmetric(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """Return the mean of ``matrix`` and its transpose.

    BLAS does not guarantee that (i, j) and (j, i) are equal to the last bit.
    """
    return (matrix + matrix.T) / 2
