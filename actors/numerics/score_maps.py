"""Narrower query and key heads without rope: the best scores of a rank, by an SVD."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actors.numerics.gram import symmetric
from actors.numerics.linalg import cholesky_psd, eigh_descending


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMaps:
    """The maps of the channels without rope, whose first columns give the best scores.

    Attributes:
        queries: A, of all query heads of a KV head.
        keys: B: ``q A_r (k B_r)^T`` is the best approximation of ``q k^T`` of rank r.
        energy: what each direction adds to ``|q k^T|_F^2`` over all pairs of tokens, descending.
    """

    queries: Float[Tensor, "rest rest"]
    keys: Float[Tensor, "rest rest"]
    energy: Float[Tensor, " rest"]


def score_maps(
    q_gram: Float[Tensor, "rest rest"], k_gram: Float[Tensor, "rest rest"], *, where: str
) -> ScoreMaps:
    """Return the maps of one KV head.

    With ``R^T R`` the gram of k and V the right singular vectors of ``Q R^T``, for Q the queries of
    all heads of the group below each other: ``A = R^T V`` and ``B = R^-1 V``.

    Args:
        q_gram: sum of the grams of the query heads of the group, float64.
        k_gram: of k, float64; centred, since what all keys share does not change a softmax.
        where: names the layer and head in errors.

    Raises:
        NumericsError: a gram is not finite, or not positive semi-definite.
    """
    lower, _ = cholesky_psd(k_gram, ridge=1e-10, where=where)
    spectrum = eigh_descending(symmetric(lower.T @ q_gram @ lower), where=where)
    return ScoreMaps(
        queries=lower @ spectrum.vectors,
        keys=torch.linalg.solve_triangular(lower.T, spectrum.vectors, upper=True),
        energy=spectrum.values.clamp_min(0),
    )
