"""Refit a linear by least squares, from sums over tokens of inputs and residuals.

With inputs Z, weights W and a target T, the sums are of the residual ``R = T - Z W``: a step D
changes it to ``R - Z D``, and the D that minimises ``|R - Z D|^2 + r |D|^2`` is
``(Z^T Z + r I)^-1 Z^T R``. So a linear that already fits, with residual zero, does not change.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from actors.numerics.gram import accumulate, symmetric
from actors.numerics.linalg import cholesky_psd

MIN_GAIN = 1e-3  # share of the residual energy of unseen tokens to be removed; less may be rounding


@dataclass(slots=True, kw_only=True)
class RestSums:
    """Sums over tokens of the inputs and residuals of a linear, in float64.

    Attributes:
        gram: ``Z^T Z``, (dim, dim).
        cross: ``Z^T R``, (dim, out).
        energy: ``|R|^2``, one element.
    """

    gram: Float[Tensor, "dim dim"]
    cross: Float[Tensor, "dim out"]
    energy: Float[Tensor, " 1"]

    def add(self, inputs: Float[Tensor, "tokens dim"], rest: Float[Tensor, "tokens out"]) -> None:
        """Add one microbatch, in place; its products are computed in float32."""
        accumulate(self.gram, inputs)
        rest = rest.to(torch.float32)
        self.cross.add_(inputs.to(torch.float32).T @ rest)
        self.energy.add_(rest.square().sum(dtype=torch.float64))

    def left(self, step: Float[Tensor, "dim out"]) -> float:
        """Return ``|R - Z step|^2``."""
        bent = symmetric(self.gram) @ step - 2 * self.cross
        return float(self.energy[0] + (step * bent).sum())


def empty_sums(dim: int, out_dim: int, *, device: str) -> RestSums:
    """Return sums over zero tokens."""
    return RestSums(
        gram=torch.zeros(dim, dim, dtype=torch.float64, device=device),
        cross=torch.zeros(dim, out_dim, dtype=torch.float64, device=device),
        energy=torch.zeros(1, dtype=torch.float64, device=device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """The weights that were best on unseen tokens.

    Attributes:
        weight: (out, dim), in the dtype it came in.
        damping: that was chosen; -1 if the weights are unchanged.
        before: ``|R|^2`` of the unseen tokens.
        after: likewise, with these weights.
        rungs: of the factorisations that needed extra damping.
    """

    weight: Float[Tensor, "out dim"]
    damping: float
    before: float
    after: float
    rungs: list[str] = field(default_factory=list)


def least_squares_step(
    sums: RestSums, *, damping: float, where: str
) -> tuple[Float[Tensor, "dim out"], str]:
    """Return the D that minimises ``|R - Z D|^2 + damping * mean(diag(Z^T Z)) * |D|^2``.

    Args:
        sums: over the tokens to fit.
        damping: relative, hence independent of the scale of the activations.
        where: names the layer and linear in errors.

    Returns:
        D, and the rung of the damping ladder at which the factorisation succeeded.

    Raises:
        NumericsError: the gram is not finite, or not positive definite on any rung.
    """
    factor, rung = cholesky_psd(symmetric(sums.gram), ridge=damping, where=where)
    return torch.cholesky_solve(sums.cross, factor), rung


def refit(
    weight: Float[Tensor, "out dim"],
    seen: RestSums,
    unseen: RestSums,
    *,
    dampings: tuple[float, ...],
    where: str,
) -> Refit:
    """Return the weights refitted on seen tokens with the damping that is best on unseen ones.

    The weights are unchanged if no damping removes more than `MIN_GAIN` of the residual energy of
    unseen tokens. Each candidate is evaluated as stored, rounded to the dtype of ``weight``.

    Raises:
        NumericsError: a gram is not finite, or not positive definite on any rung.
    """
    before = float(unseen.energy[0])
    best = Refit(weight=weight, damping=-1.0, before=before, after=before)
    limit, rungs = (1 - MIN_GAIN) * before, []
    old = weight.to(torch.float64)
    for damping in dampings:
        step, rung = least_squares_step(seen, damping=damping, where=where)
        rungs += [rung] if rung != "cholesky" else []
        new = (old + step.T).to(weight.dtype)
        left = unseen.left((new.to(torch.float64) - old).T)
        if left < min(limit, best.after):
            best = Refit(weight=new.contiguous(), damping=damping, before=before, after=left)
    return Refit(
        weight=best.weight, damping=best.damping, before=before, after=best.after, rungs=rungs
    )
