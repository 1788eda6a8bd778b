"""The best factors of a linear under the Gram matrix of its inputs, by the axes of its outputs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actors.numerics.linalg import BLOCK, cholesky_psd, eigh_descending
from actors.numerics.packed import Symmetric, congruence


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The principal axes of ``x W`` over the tokens of a gram.

    Attributes:
        vectors: of the outputs, shape (out, out), or of the whitened inputs, shape (in, in).
        energy: share of each in ``|x W|_F^2``, unnormalised, descending.
        factor: lower Cholesky factor of the gram, where the axes are those of the inputs.
        rung: of the damping ladder at which the factorisation succeeded.
    """

    vectors: Float[Tensor, "dim dim"]
    energy: Float[Tensor, " dim"]
    factor: Float[Tensor, "inner inner"] | None
    rung: str


def output_axes(weight: Float[Tensor, "out inner"], gram: Symmetric, *, where: str) -> Axes:
    """Return the axes of the narrower side.

    Raises:
        NumericsError: the gram is not finite, or not positive semi-definite.
    """
    out_dim, in_dim = weight.shape
    if out_dim <= in_dim:
        spectrum = eigh_descending(congruence(weight.to(torch.float64), gram), where=where)
        factor, rung = None, spectrum.rung
    else:
        factor, rung = cholesky_psd(gram, ridge=1e-10, where=where)  # x^T x = L L^T
        # Only the gram of the whitened weight W L is formed, over blocks of its long side.
        spectrum = eigh_descending(congruence(factor.T, _inner_gram(weight)), where=where)
    energy = spectrum.values.clamp_min(0)
    return Axes(vectors=spectrum.vectors, energy=energy, factor=factor, rung=rung)


def low_rank(
    weight: Float[Tensor, "out inner"], gram: Symmetric, *, rank: int, where: str
) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "out rank"], float, str]:
    """Return `truncated` for a weight and its axes.

    Args:
        weight: of any dtype; the factors are in float64.
        gram: of the linear's input.
        rank: columns between the factors.
        where: names the layer and linear in errors.

    Raises:
        NumericsError: the gram is not finite, or not positive semi-definite.
    """
    return truncated(weight, output_axes(weight, gram, where=where), rank=rank)


def truncated(
    weight: Float[Tensor, "out inner"], found: Axes, *, rank: int
) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "out rank"], float, str]:
    """Return both factors, ``|x W - x W'|_F / |x W|_F`` on the tokens of the gram, and the rung.

    Args:
        weight: of any dtype; the factors are in float64.
        found: its axes, which serve all ranks.
        rank: columns between the factors.
    """
    axes = found.vectors[:, :rank]
    if found.factor is None:
        first, second = axes.T @ weight.to(torch.float64), axes  # axes are (out, rank)
    else:
        unwhitened = found.factor @ axes
        second = torch.empty(len(weight), rank, dtype=torch.float64, device=weight.device)
        for rows, into in zip(*(torch.split(t, BLOCK) for t in (weight, second)), strict=True):
            torch.mm(rows.to(torch.float64), unwhitened, out=into)
        first = torch.linalg.solve_triangular(found.factor.T, axes, upper=True).T
    lost = found.energy[rank:].sum() / found.energy.sum().clamp_min(1e-300)
    return first, second, float(lost.sqrt()), found.rung


def _inner_gram(weight: Float[Tensor, "out inner"]) -> Float[Tensor, "inner inner"]:
    """Return ``W^T W`` in float64."""
    inner = weight.shape[1]
    total = torch.zeros(inner, inner, dtype=torch.float64, device=weight.device)
    for rows in torch.split(weight, BLOCK):
        rows = rows.to(torch.float64)
        total.addmm_(rows.T, rows)
    return total
