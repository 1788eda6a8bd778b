"""Nystrom approximation of a hidden layer from its gram: which units to keep, and their refit.

With the units in the order of their scores and ``C + ridge I = L L^T`` in that order, one factor
serves every number of kept units k: the refit of the output weights W to the first k units is
``L_kk^-T (L^T W)[:k]``, and the squared error on the calibration tokens is the energy of the rows
of ``L^T W`` after the first k.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actors.numerics.linalg import (
    BLOCK,
    cholesky_psd,
    inverse_diagonal,
    lower_transposed_times,
    solve_lower_transposed,
)
from actors.numerics.packed import Symmetric


@dataclass(frozen=True, slots=True, kw_only=True)
class Nystrom:
    """One factorisation that serves every width.

    Attributes:
        order: units, the most important first, shape (dim,).
        factor: lower Cholesky factor of the ridged gram in that order, (dim, dim), float64.
        turned: ``L^T W`` in that order, (dim, out), float64.
        rung: of the damping ladder at which the factorisation succeeded.
    """

    order: Int[Tensor, " dim"]
    factor: Float[Tensor, "dim dim"]
    turned: Float[Tensor, "dim out"]
    rung: str

    def refit(
        self, keep_dim: int, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Int[Tensor, " keep"], Float[Tensor, "keep out"]]:
        """Return the kept units, ascending, and output weights refitted to them, in ``dtype``."""
        kept, position = self.order[:keep_dim].sort()
        # A block of outputs at a time: full-size float64 weights would exceed the planned memory.
        parts = torch.split(self.turned[:keep_dim], BLOCK, dim=1)
        solved = [solve_lower_transposed(self.factor, t)[position].to(dtype) for t in parts]
        return kept, torch.cat(solved, dim=1)

    def relative_error(self, keep_dim: int) -> float:
        """Return ``||Z W - Z_S W'||_F / ||Z W||_F`` over the calibration tokens, ridge included."""
        energy = torch.linalg.vector_norm(self.turned, dim=1).square()  # without a full copy
        return float((energy[keep_dim:].sum() / energy.sum().clamp_min(1e-300)).sqrt())


def _inverse_diagonal(gram: Symmetric, *, ridge: float, where: str) -> Float[Tensor, " dim"]:
    factor, _ = cholesky_psd(gram, ridge=ridge, where=where)
    return inverse_diagonal(factor)


def nystrom(
    gram: Symmetric,
    weights: Float[Tensor, "dim out"],
    *,
    ridge: float,
    where: str,
) -> Nystrom:
    """Return the factorisation of a hidden layer with output ``Z weights``.

    Args:
        gram: ``Z^T Z``.
        weights: output weights, one row per unit.
        ridge: relative to the mean of the gram's diagonal.
        where: names the layer in errors.

    Raises:
        NumericsError: the gram is not finite, or not positive definite on any rung.
    """
    # Orders by leverage, even where a small ridge rounds all leverages to 1.
    order = _inverse_diagonal(gram, ridge=ridge, where=where).argsort(stable=True)
    factor, rung = cholesky_psd(gram, ridge=ridge, where=where, order=order)
    dims = (len(factor), weights.shape[1])
    turned = torch.empty(dims, dtype=torch.float64, device=factor.device)
    parts, places = (torch.split(t, BLOCK, dim=1) for t in (weights, turned))
    for part, into in zip(parts, places, strict=True):
        into.copy_(lower_transposed_times(factor, part[order].to(torch.float64)))
    return Nystrom(order=order, factor=factor, turned=turned, rung=rung)
