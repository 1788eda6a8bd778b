"""Factors that neighbouring layers share: decompositions of a stack of one linear of each layer.

With W_l (out, inner) in torch's orientation, ``y = W_l x``, and C the sum of the layers' Gram
matrices, each form is fitted to the least ``sum_l tr((W_l - W'_l) C (W_l - W'_l)^T)``:

| form | W'_l | shared | own |
|---|---|---|---|
| basis (Basis Sharing, arXiv:2410.03765) | ``second_l first`` | first | second_l |
| Tucker (of modes 2 and 3) | ``second core_l first`` | first, second | core_l |
| CP | ``second diag(scale_l) first`` | first, second | scale_l |

With ``C = L L^T`` that is the Frobenius norm of the whitened stack ``W_l L``. What is a layer's own
is then fitted again under the layer's own Gram matrix, to the shared factors as they are stored.
All is computed in float64, whatever the dtype of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actors.numerics.linalg import cholesky_psd, eigh_descending
from actors.numerics.packed import Symmetric, all_finite, congruence, unpacked
from planners.errors import NumericsError

RIDGE = 1e-10  # relative to the mean of a diagonal, as where one linear is factored
# Of a step of CP. It pulls towards the components before the step, never towards zero: so no sweep
# raises the error, and two components that cancel each other grow slowly.
STEP_RIDGE = 1e-4
TOLERANCE = 1e-6  # sweeps end where one lowers the error by less, relatively
EXACT = 1e-7  # a smaller error is rounding
MAX_TUCKER_SWEEPS = 10
MAX_CP_SWEEPS = 50
TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The whitened weights of the layers, which serve all forms and ranks.

    Attributes:
        weights: ``W_l L``, float64.
        factor: L, the lower Cholesky factor of the sum of the layers' Gram matrices.
        energy: ``sum_l |W_l L|_F^2``.
        rung: of the damping ladder at which the factorisation succeeded.
    """

    weights: Float[Tensor, "layers out inner"]
    factor: Float[Tensor, "inner inner"]
    energy: float
    rung: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """A basis of the inputs that all layers share, ``W_l ~ seconds[l] first``, in float64.

    Attributes:
        first: shared; orthonormal rows in the metric of the stack's Gram matrix.
        seconds: one of each layer.
        error: ``|W - W'| / |W|`` of the whitened stack.
    """

    first: Float[Tensor, "rank inner"]
    seconds: Float[Tensor, "layers out rank"]
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tucker:
    """Bases of inputs and outputs that all layers share, ``W_l ~ second cores[l] first``.

    Attributes:
        first: shared; orthonormal rows in the metric of the stack's Gram matrix.
        second: shared; orthonormal columns.
        cores: one of each layer.
        errors: ``|W - W'| / |W|`` of the whitened stack at the start, and after each sweep.
    """

    first: Float[Tensor, "rank_in inner"]
    second: Float[Tensor, "out rank_out"]
    cores: Float[Tensor, "layers rank_out rank_in"]
    errors: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CP:
    """Components of rank one that all layers share, ``W_l ~ second diag(scales[l]) first``.

    Attributes:
        first: shared; rows of length 1 in the metric of the stack's Gram matrix.
        second: shared; columns of length 1.
        scales: of the components, in each layer.
        errors: ``|W - W'| / |W|`` of the whitened stack at the start, and after each sweep.
    """

    first: Float[Tensor, "rank inner"]
    second: Float[Tensor, "out rank"]
    scales: Float[Tensor, "layers rank"]
    errors: list[float]


def whitened(
    weights: Sequence[Float[Tensor, "out inner"]], gram: Symmetric, *, where: str
) -> Stack:
    """Return the weights of the layers times the Cholesky factor of the Gram matrix.

    Args:
        weights: one linear of each layer, of any dtype.
        gram: the sum over the layers of the Gram matrices of the linear's inputs.
        where: names the layers and linear in errors.

    Raises:
        NumericsError: a weight or the gram is not finite, or the gram not positive semi-definite.
    """
    _require_finite(*weights, where=where)
    factor, rung = cholesky_psd(gram, ridge=RIDGE, where=where)
    stacked = torch.stack([weight.to(torch.float64) @ factor for weight in weights])
    return Stack(weights=stacked, factor=factor, energy=float(stacked.square().sum()), rung=rung)


def shared_basis(stack: Stack, *, rank: int, where: str) -> Basis:
    """Return the best basis of a rank, and the coefficients of each layer (arXiv:2410.03765).

    With V the first right singular vectors of the ``W_l L`` below each other, from the
    eigendecomposition of ``sum_l L^T W_l^T W_l L``: ``first = V^T L^-1``, ``second_l = W_l L V``.

    Args:
        stack: whitened weights.
        rank: rows of the basis; at most inner.
        where: names the layers and linear in errors.

    Raises:
        NumericsError: no eigendecomposition converged.
    """
    axes, lost = _axes(stack.weights, rank, where=where)
    return Basis(
        first=_unwhitened(axes, stack.factor),
        seconds=stack.weights @ axes,
        error=_relative(lost, stack.energy),
    )


def tucker(stack: Stack, *, rank_in: int, rank_out: int, where: str) -> Tucker:
    """Return bases of inputs and outputs, by alternating sweeps from the truncated HOSVD.

    A sweep (HOOI, De Lathauwer et al. 2000, doi:10.1137/S0895479898346995) replaces U by the first
    left axes of the ``W_l L V`` side by side, then V by the first right axes of the ``U^T W_l L``
    below each other: no sweep raises the error. At the end ``first = V^T L^-1``, ``second = U``,
    ``core_l = U^T W_l L V``.

    Args:
        stack: whitened weights.
        rank_in: rows of ``first``; at most inner.
        rank_out: columns of ``second``; at most out.
        where: names the layers and linear in errors.

    Raises:
        NumericsError: no eigendecomposition converged.
    """
    weights = stack.weights
    right, _ = _axes(weights, rank_in, where=where)
    left, _ = _axes(weights.mT, rank_out, where=where)
    cores = left.T @ (weights @ right)
    errors = [_relative(_distance(weights, left @ cores @ right.T), stack.energy)]
    for _ in range(MAX_TUCKER_SWEEPS):
        left, _ = _axes((weights @ right).mT, rank_out, where=where)
        turned = left.T @ weights  # (layers, rank_out, inner)
        right, _ = _axes(turned, rank_in, where=where)
        cores = turned @ right
        errors.append(_relative(_distance(weights, left @ cores @ right.T), stack.energy))
        if _settled(errors):
            break
    return Tucker(first=_unwhitened(right, stack.factor), second=left, cores=cores, errors=errors)


def cp(stack: Stack, *, rank: int, where: str) -> CP:
    """Return components by alternating least squares (Kolda and Bader 2009, doi:10.1137/07070111X).

    The normal equations of a mode need the Hadamard product G of the Grams of the other two modes
    only, no Khatri-Rao product. A step is ``(M - A G) (G + ridge I)^-1`` with M the products of the
    whitened stack with the components of the other modes, so no sweep raises the error.

    The start is the better of two, neither of them random: the largest singular triples of the
    principal combinations of the layers, which is exact at rank ``layers * inner``; and the
    simultaneous diagonalisation of the first two combinations, exact where the stack has the form.

    Args:
        stack: whitened weights.
        rank: number of components, at most ``layers * inner``.
        where: names the layers and linear in errors.

    Raises:
        NumericsError: a factorisation failed on every rung.
    """
    weights, energy = stack.weights, stack.energy
    starts = [_singular_start(weights, rank, where=where)]
    if len(weights) > 1 and rank <= min(weights.shape[1:]):
        starts += _pencil_start(weights, rank, where=where)
    fitted = [_scaled(weights, left, right, where=where) for left, right in starts]
    losses = [_distance(weights, _composed(*each)) for each in fitted]
    best = min(range(len(starts)), key=losses.__getitem__)
    left, scales, right = fitted[best]
    errors = [_relative(losses[best], energy)]
    for _ in range(MAX_CP_SWEEPS):
        left, scales, right, gained = _swept(weights, left, scales, right, where=where)
        errors.append(_relative(energy - gained, energy))
        if _settled(errors):
            break
    return CP(first=_unwhitened(right, stack.factor), second=left, scales=scales, errors=errors)


def coefficients(
    weight: Float[Tensor, "out inner"],
    first: Float[Tensor, "rank inner"],
    gram: Symmetric,
    *,
    where: str,
) -> Float[Tensor, "out rank"]:
    """Return ``W C F^T (F C F^T)^-1``: the best second factor to a first one F that is given.

    Args:
        weight: W, of one layer.
        first: F, of any dtype, as it is stored.
        gram: C, of the layer's own inputs.
        where: names the layer and linear in errors.

    Raises:
        NumericsError: an argument is not finite, or the gram not positive semi-definite.
    """
    crossed, inner = _crossed(weight, first, gram, where=where)
    return _solved(inner, crossed.T, where=where).T


def core(
    weight: Float[Tensor, "out inner"],
    first: Float[Tensor, "rank_in inner"],
    second: Float[Tensor, "out rank_out"],
    gram: Symmetric,
    *,
    where: str,
) -> Float[Tensor, "rank_out rank_in"]:
    """Return ``(S^T S)^-1 S^T W C F^T (F C F^T)^-1``: the best core between given F and S.

    Args:
        weight: W, of one layer.
        first: F, of any dtype, as it is stored.
        second: S, likewise.
        gram: C, of the layer's own inputs.
        where: names the layer and linear in errors.

    Raises:
        NumericsError: an argument is not finite, or the gram not positive semi-definite.
    """
    own, s = coefficients(weight, first, gram, where=where), second.to(torch.float64)
    return _solved(s.T @ s, s.T @ own, where=where)


def scales(
    weight: Float[Tensor, "out inner"],
    first: Float[Tensor, "rank inner"],
    second: Float[Tensor, "out rank"],
    gram: Symmetric,
    *,
    where: str,
) -> Float[Tensor, " rank"]:
    """Return ``((S^T S) * (F C F^T))^-1 diag(S^T W C F^T)``: the best diagonal between F and S.

    Args:
        weight: W, of one layer.
        first: F, of any dtype, as it is stored.
        second: S, likewise.
        gram: C, of the layer's own inputs.
        where: names the layer and linear in errors.

    Raises:
        NumericsError: an argument is not finite, or the gram not positive semi-definite.
    """
    crossed, inner = _crossed(weight, first, gram, where=where)
    s = second.to(torch.float64)
    return _solved((s.T @ s) * inner, (s * crossed).sum(dim=0)[:, None], where=where)[:, 0]


def relative_error(
    weight: Float[Tensor, "out inner"], approximation: Float[Tensor, "out inner"], gram: Symmetric
) -> float:
    """Return ``|x W - x W'|_F / |x W|_F`` over the tokens of the gram."""
    whole, old = unpacked(gram), weight.to(torch.float64)
    rest = old - approximation.to(torch.float64)
    lost, energy = (float(((each @ whole) * each).sum()) for each in (rest, old))
    return _relative(lost, energy)


def _axes(matrices: Tensor, rank: int, *, where: str) -> tuple[Tensor, float]:
    """Return the first right axes of matrices below each other, and the energy of the others.

    Args:
        matrices: shape (layers, rows, inner).
        rank: number of axes, which are columns.
        where: names the layers and linear in errors.
    """
    below = matrices.flatten(0, 1)  # (layers * rows, inner)
    spectrum = eigh_descending(below.T @ below, where=where)
    return spectrum.vectors[:, :rank].contiguous(), float(spectrum.values[rank:].sum())


def _unwhitened(axes: Float[Tensor, "inner rank"], factor: Tensor) -> Float[Tensor, "rank inner"]:
    found: Tensor = torch.linalg.solve_triangular(factor.T, axes, upper=True)
    return found.T.contiguous()


def _distance(weights: Tensor, approximation: Tensor) -> float:
    return float((weights - approximation).square().sum())


def _relative(lost: float, energy: float) -> float:
    return float((max(lost, 0.0) / max(energy, TINY)) ** 0.5)


def _settled(errors: Sequence[float]) -> bool:
    return errors[-1] <= EXACT or errors[-2] - errors[-1] <= TOLERANCE * errors[-2]


def _composed(left: Tensor, scales: Tensor, right: Tensor) -> Float[Tensor, "layers out inner"]:
    return (left * scales[:, None, :]) @ right.T


def _combinations(weights: Float[Tensor, "layers out inner"]) -> Float[Tensor, "layers out inner"]:
    """Return the layers' principal combinations, orthogonal to each other, largest first."""
    flat = weights.flatten(1)
    _, vectors = torch.linalg.eigh(flat @ flat.T)
    combined: Tensor = vectors.flip(1).T @ flat
    return combined.view_as(weights)


def _singular_start(weights: Tensor, rank: int, *, where: str) -> tuple[Tensor, Tensor]:
    """Return the largest singular triples of all combinations together, as unit columns."""
    right, sizes = [], []
    combinations = _combinations(weights)
    for each in combinations:
        spectrum = eigh_descending(each.T @ each, where=where)
        right.append(spectrum.vectors)
        sizes.append(spectrum.values)
    left = torch.cat([each @ axes for each, axes in zip(combinations, right, strict=True)], dim=1)
    kept = torch.cat(sizes).argsort(descending=True, stable=True)[:rank]
    return _unit(left[:, kept])[0], torch.cat(right, dim=1)[:, kept]


def _pencil_start(weights: Tensor, rank: int, *, where: str) -> list[tuple[Tensor, Tensor]]:
    """Return components that diagonalise the first two combinations of the layers, if any do.

    Where ``X_l = A diag(s_l) B^T``, the columns of A are the eigenvectors of ``X_2 X_1^-1``, and
    each row of ``A^-1 X_l`` is a multiple of one of B.
    """
    left, _ = _axes(weights.mT, rank, where=where)
    right, _ = _axes(weights, rank, where=where)
    cores = _combinations(left.T @ (weights @ right))  # (layers, rank, rank)
    try:
        values, vectors = torch.linalg.eig(torch.linalg.solve(cores[0], cores[1], left=False))
        # The real and the imaginary part span what a pair of complex eigenvectors spans.
        mixed = torch.where(values.imag < 0, vectors.imag, vectors.real)
        rows = torch.linalg.solve(mixed, cores).transpose(0, 1)  # (rank, layers, rank)
    except torch.linalg.LinAlgError:  # singular: the other start has to do
        return []
    _, turns = torch.linalg.eigh(rows @ rows.mT)
    found = (turns[:, None, :, -1] @ rows)[:, 0]  # the first right axis of each, times its size
    start = _unit(left @ mixed)[0], _unit(right @ found.T)[0]
    return [start] if all_finite(start[0]) and all_finite(start[1]) else []


def _unit(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns of length 1, and their lengths; one of zeros stays."""
    length = torch.linalg.vector_norm(columns, dim=0)
    return columns / length.clamp_min(TINY), length


def _scaled(
    weights: Tensor, left: Tensor, right: Tensor, *, where: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the components with their best scales."""
    matched = (right * (weights.mT @ left)).sum(dim=1)  # (layers, rank)
    products = (left.T @ left) * (right.T @ right)
    return left, _solved(products, matched.T, where=where).T, right


def _swept(
    weights: Tensor, left: Tensor, scales: Tensor, right: Tensor, *, where: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the components after a step of each mode, and the energy that they explain.

    Those of the shared modes have length 1.
    """
    matched = ((weights @ right) * scales[:, None, :]).sum(dim=0)  # (out, rank)
    left = _stepped(left, matched, (scales.T @ scales) * (right.T @ right), where=where)
    left, length = _unit(left)
    scales = scales * length
    products = weights.mT @ left  # (layers, inner, rank)
    own = left.T @ left
    matched = (products * scales[:, None, :]).sum(dim=0)
    right = _stepped(right, matched, (scales.T @ scales) * own, where=where)
    right, length = _unit(right)
    matched = (products * right).sum(dim=1)  # (layers, rank)
    own = own * (right.T @ right)
    scales = _stepped(scales * length, matched, own, where=where)
    gained = (scales * (2 * matched - scales @ own)).sum()  # |X|^2 - |X - X'|^2, without X'
    return left, scales, right, float(gained)


def _stepped(old: Tensor, matched: Tensor, products: Tensor, *, where: str) -> Tensor:
    """Return the minimiser of the error plus a multiple of the squared size of the step."""
    factor, _ = cholesky_psd(products, ridge=STEP_RIDGE, where=where)
    return old + torch.cholesky_solve((matched - old @ products).T, factor).T


def _solved(matrix: Tensor, right: Tensor, *, where: str) -> Tensor:
    factor, _ = cholesky_psd(matrix, ridge=RIDGE, where=where)
    return torch.cholesky_solve(right, factor)


def _crossed(
    weight: Tensor, first: Tensor, gram: Symmetric, *, where: str
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank rank"]]:
    """Return ``W C F^T`` and ``F C F^T``."""
    _require_finite(weight, first, where=where)
    f = first.to(torch.float64)
    crossed = weight.to(torch.float64) @ (unpacked(gram) @ f.T)
    return crossed, congruence(f, gram)


def _require_finite(*weights: Tensor, where: str) -> None:
    if not all(all_finite(weight) for weight in weights):
        raise NumericsError(f"{where}: the weights have entries that are NaN or infinite")
