"""Factorisations that every method shares, with the ladder for matrices that do not behave."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from planners.errors import NumericsError

DAMPINGS = (0.0, 1e-12, 1e-8, 1e-4)  # relative to the mean of the diagonal
SINGULAR = 1e-9  # a pivot below this much of the mean of the diagonal, times the width, is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """Eigenvalues, descending, and their vectors.

    Attributes:
        values: shape (dim,), float64, >= 0 up to rounding.
        vectors: shape (dim, dim), float64, columns; the entry of largest size of each is positive.
        rung: how the factorisation was reached, ``eigh`` when nothing went wrong.
    """

    values: Float[Tensor, " dim"]
    vectors: Float[Tensor, "dim dim"]
    rung: str


def eigh_descending(matrix: Float[Tensor, "dim dim"], *, where: str) -> Spectrum:
    """Return the spectrum of a symmetric matrix, in float64.

    Args:
        matrix: symmetric, positive semi-definite up to rounding.
        where: names the layer and tap in the error.

    Raises:
        NumericsError: ``matrix`` has an entry that is not finite, or no rung of the ladder held.
    """
    if not torch.isfinite(matrix).all():
        raise NumericsError(f"{where}: the gram has entries that are NaN or infinite")
    matrix = matrix.to(torch.float64)
    scale = matrix.diagonal().mean()
    for device in dict.fromkeys((matrix.device.type, "cpu")):
        for damping in DAMPINGS:
            # Damping does not turn eigenvectors; it only helps the iteration to converge.
            shifted = matrix.to(device, copy=True)
            shifted.diagonal().add_(damping * scale.to(device))
            try:
                values, vectors = torch.linalg.eigh(shifted)
            except torch.linalg.LinAlgError:
                continue
            if torch.isfinite(values).all() and torch.isfinite(vectors).all():
                rung = "eigh" if damping == 0.0 else f"eigh damped {damping:g} on {device}"
                return _ordered(values - damping * scale.to(device), vectors, rung)
    raise NumericsError(f"{where}: no eigendecomposition of a {tuple(matrix.shape)} gram converged")


def _ordered(values: Tensor, vectors: Tensor, rung: str) -> Spectrum:
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.abs().argmax(dim=0)
    sign = vectors.gather(0, largest[None, :]).sign()
    # An eigenvector's sign is a library's whim; fixed here so that files compare across machines.
    return Spectrum(values=values, vectors=vectors * sign, rung=rung)


def cholesky_psd(
    matrix: Float[Tensor, "dim dim"], *, ridge: float, where: str
) -> tuple[Float[Tensor, "dim dim"], str]:
    """Return the lower factor of ``matrix + ridge * mean(diag) * I`` in float64, and its rung.

    Args:
        matrix: symmetric, positive semi-definite up to rounding.
        ridge: relative to the mean of the diagonal (to 1 where that is zero: nothing was ever
            active); raised step by step where it is too small.
        where: names the layer and tap in the error.

    Raises:
        NumericsError: ``matrix`` has an entry that is not finite, or no rung of the ladder held.
    """
    if not torch.isfinite(matrix).all():
        raise NumericsError(f"{where}: the gram has entries that are NaN or infinite")
    mean = matrix.diagonal().mean()
    scale = mean if mean > 0 else torch.ones_like(mean)
    for damping in DAMPINGS:
        shifted = matrix.to(torch.float64, copy=True)
        shifted.diagonal().add_((ridge + damping) * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed and torch.isfinite(factor).all():
            pivot = float(factor.diagonal().min().square() / scale)
            named = "cholesky" if damping == 0.0 else f"cholesky damped {damping:g}"
            # A singular matrix may pass: then the ridge, or rounding, is all its last pivots have.
            return factor, f"{named}, singular" if pivot < SINGULAR * len(factor) else named
    raise NumericsError(f"{where}: a {tuple(matrix.shape)} gram is not positive semi-definite")
