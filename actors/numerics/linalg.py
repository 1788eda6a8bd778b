"""Factorisations shared by all methods, with a ladder of dampings for ill-conditioned matrices."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actors.numerics.packed import Symmetric, all_finite, diagonal, permuted, unpacked, width
from planners.errors import NumericsError

DAMPINGS = (0.0, 1e-12, 1e-8, 1e-4)  # relative to the mean of the diagonal
SINGULAR = 1e-9  # times width and mean of the diagonal: a smaller pivot counts as zero
MAX_EIGH_DIM = 16384  # 8.6 GB with vectors and workspace, and most of an hour on one core
BLOCK = 1024  # columns of a triangular solve, and rows that are multiplied at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """Eigenvalues in descending order, and their eigenvectors.

    Attributes:
        values: shape (dim,), float64, >= 0 up to rounding.
        vectors: shape (dim, dim), float64, columns; the entry of largest size of each is positive.
        rung: the step of the ladder that succeeded, ``eigh`` if no damping was needed.
    """

    values: Float[Tensor, " dim"]
    vectors: Float[Tensor, "dim dim"]
    rung: str


def eigh_descending(matrix: Symmetric, *, where: str) -> Spectrum:
    """Return the spectrum of a symmetric matrix, in float64.

    Args:
        matrix: positive semi-definite up to rounding.
        where: names the layer and tap in the error.

    Raises:
        NumericsError: ``matrix`` has an entry that is not finite, is wider than `MAX_EIGH_DIM`, or
            every rung of the ladder failed.
    """
    dim = width(matrix)
    if dim > MAX_EIGH_DIM:
        raise NumericsError(
            f"{where}: the eigendecomposition of a {dim} x {dim} Gram matrix needs "
            f"{32 * dim**2:,} bytes and {9 * dim**3:.1e} operations; the limit is {MAX_EIGH_DIM}",
            hint="use a method that needs a Cholesky factor only: it takes a tenth of the time",
        )
    _require_finite(matrix, where)
    scale = diagonal(matrix).mean()
    whole = unpacked(matrix)
    for device in dict.fromkeys((matrix.device.type, "cpu")):
        for damping in DAMPINGS:
            # Damping does not turn eigenvectors; it only helps the iteration to converge.
            shift = damping * scale.to(device)
            shifted = whole.to(device)
            shifted.diagonal().add_(shift)
            try:
                values, vectors = torch.linalg.eigh(shifted)
            except torch.linalg.LinAlgError:
                continue
            finally:
                shifted.diagonal().sub_(shift)
            if all_finite(values) and all_finite(vectors):
                rung = "eigh" if damping == 0.0 else f"eigh damped {damping:g} on {device}"
                del whole, shifted
                return _ordered(values - shift, vectors, rung)
    raise NumericsError(
        f"{where}: no eigendecomposition of the {dim} x {dim} Gram matrix converged"
    )


def _ordered(values: Tensor, vectors: Tensor, rung: str) -> Spectrum:
    values, vectors = values.flip(0), vectors.flip(1)
    for columns in torch.split(vectors, BLOCK, dim=1):
        largest = columns.abs().argmax(dim=0)
        # The sign of an eigenvector depends on the library; it is fixed here so that files can be
        # compared across machines.
        columns.mul_(columns.gather(0, largest[None, :]).sign())
    return Spectrum(values=values, vectors=vectors, rung=rung)


def cholesky_psd(
    matrix: Symmetric,
    *,
    ridge: float,
    where: str,
    order: Int[Tensor, " dim"] | None = None,
) -> tuple[Float[Tensor, "dim dim"], str]:
    """Return the lower factor of ``matrix + ridge * mean(diag) * I`` in float64, and its rung.

    Beside ``matrix`` only one other full-size matrix is in memory, the factor.

    Args:
        matrix: positive semi-definite up to rounding.
        ridge: relative to the mean of the diagonal (to 1 where that is zero, for inputs that were
            never active); raised step by step where it is too small.
        where: names the layer and tap in the error.
        order: permutation of rows and columns.

    Raises:
        NumericsError: ``matrix`` has an entry that is not finite, or every rung failed.
    """
    _require_finite(matrix, where)
    mean = diagonal(matrix).mean()
    scale = mean if mean > 0 else torch.ones_like(mean)
    for damping in DAMPINGS:
        shifted = unpacked(matrix) if order is None else permuted(matrix, order)
        shifted.diagonal().add_((ridge + damping) * scale)
        factor, failed = _factored_in_place(shifted)
        if not failed and all_finite(factor):
            pivot = float(factor.diagonal().min().square() / scale)
            named = "cholesky" if damping == 0.0 else f"cholesky damped {damping:g}"
            # A singular matrix may succeed: then its last pivots consist of ridge or rounding only.
            return factor, f"{named}, singular" if pivot < SINGULAR * len(factor) else named
        del shifted, factor  # before the next one is allocated
    dim = width(matrix)
    raise NumericsError(f"{where}: the {dim} x {dim} Gram matrix is not positive semi-definite")


def _factored_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """Return the lower Cholesky factor in the memory of ``matrix``, and whether it failed.

    Only the lower triangle is read.
    """
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    # LAPACK's order is by columns: the transposed view's upper factor is our lower one, row-major.
    turned = matrix.mT
    torch.linalg.cholesky_ex(turned, upper=True, out=(turned, failed))
    return matrix, bool(failed)


def inverse_diagonal(factor: Float[Tensor, "dim dim"]) -> Float[Tensor, " dim"]:
    """Return the diagonal of ``(L L^T)^-1``, a block of columns of ``L^-1`` at a time."""
    dim = len(factor)
    found = torch.empty(dim, dtype=factor.dtype, device=factor.device)
    for first in range(0, dim, BLOCK):
        last = min(first + BLOCK, dim)
        columns = torch.zeros(dim - first, last - first, dtype=factor.dtype, device=factor.device)
        columns.diagonal().fill_(1)  # of L^-1 from row ``first`` on; above it they are zero
        _solve_lower(factor[first:, first:], columns)
        found[first:last] = columns.square_().sum(dim=0)
    return found


def _solve_lower(factor: Tensor, right: Tensor) -> None:
    """Replace ``right`` by ``L^-1 right``; torch would copy the corner of the matrix first."""
    for first in range(0, len(factor), BLOCK):
        rows = slice(first, first + BLOCK)
        if first:
            right[rows].addmm_(factor[rows, :first], right[:first], alpha=-1)
        corner = factor[rows, rows].contiguous()
        right[rows] = torch.linalg.solve_triangular(corner, right[rows], upper=False)


def solve_lower_transposed(
    factor: Float[Tensor, "dim dim"], right: Float[Tensor, "keep out"]
) -> Float[Tensor, "keep out"]:
    """Return ``L_kk^-T right``, L_kk the leading corner of the factor, without a copy of it."""
    keep = len(right)
    found = right.clone()
    for first in reversed(range(0, keep, BLOCK)):
        last = min(first + BLOCK, keep)
        if last < keep:
            found[first:last].addmm_(factor[last:keep, first:last].T, found[last:], alpha=-1)
        corner = factor[first:last, first:last].T.contiguous()
        found[first:last] = torch.linalg.solve_triangular(corner, found[first:last], upper=True)
    return found


def lower_transposed_times(
    factor: Float[Tensor, "dim dim"], right: Float[Tensor, "dim out"]
) -> Float[Tensor, "dim out"]:
    """Return ``L^T right`` with half the work of a product that ignores the triangle."""
    found = torch.empty_like(right)
    for first in range(0, len(factor), BLOCK):
        rows = slice(first, first + BLOCK)
        torch.mm(factor[first:, rows].T, right[first:], out=found[rows])
    return found


def _require_finite(matrix: Symmetric, where: str) -> None:
    if not all_finite(matrix):
        raise NumericsError(f"{where}: the Gram matrix has entries that are NaN or infinite")
