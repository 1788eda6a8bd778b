"""Round the weights of a linear to few values so that its outputs change little.

With the Gram matrix H of the inputs, ``|x W - x Q|_F^2`` over the tokens is ``tr(D H D^T)``, D the
difference of the two weights. With ``H = L L^T`` it is the sum of squares of ``D L``, whose column
j depends on the columns from j on alone. So columns are rounded from the last to the first, each
where the differences of those behind it want it to be: GPTQ (arXiv:2210.17323), in the form of
Babai's nearest plane (arXiv:2507.18553), which needs no inverse. The most active inputs are rounded
first. Scales are searched before, in the original order of columns ("static groups").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actors.numerics.linalg import cholesky_psd
from actors.numerics.packed import Symmetric, diagonal, whole_blocks
from planners.model.scheme import FP8, INT, MXFP4, NVFP4, WHOLE_ROW, Scheme

PANEL = 1024  # columns to which the differences of those behind them are carried by one product
LEAF = 8  # columns that are rounded one by one
SHRINKS = tuple(1 - 0.03 * step for step in range(20))  # of the largest scale, that are tried
DAMP = 0.01  # of the mean of the diagonal, added to it
SAMPLED = 512  # rows from which errors are estimated
ROWS = 1024  # of which scales are searched at one time
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """The grid of each group of each row: values are ``(code - zero) * scale``.

    Attributes:
        scale: as float32, exact in the dtype in which it is stored.
        zero: a code; zeros where the scheme is symmetric.
        common: by which all scales were divided before they were stored; 1 but for NVFP4.
    """

    scale: Float[Tensor, "rows groups"]
    zero: Float[Tensor, "rows groups"]
    common: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A matrix on its grid.

    Attributes:
        codes: of each weight, float32: an integer, or a value of the grid of floats.
        scales: of its groups.
        scheme: by which it was rounded.
    """

    codes: Float[Tensor, "rows width"]
    scales: Scales
    scheme: Scheme

    def values(self) -> Float[Tensor, "rows width"]:
        """Return the weights in float32."""
        scale, zero = (_by_column(each, self.codes.shape[1]) for each in
                       (self.scales.scale, self.scales.zero))  # fmt: skip
        return (self.codes - zero) * scale

    def rows(self, step: int) -> "Rounded":
        """Return one row of every ``step``."""
        scales = Scales(
            scale=self.scales.scale[::step], zero=self.scales.zero[::step],
            common=self.scales.common,
        )  # fmt: skip
        return Rounded(codes=self.codes[::step], scales=scales, scheme=self.scheme)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the 16-bit dtype of scales that a loader converts to ``dtype`` without rounding."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def nearest(scaled: Tensor, scheme: Scheme) -> Tensor:
    """Return the codes of a grid that are nearest to weights over their scales."""
    if scheme.grid == INT:
        half = 2.0 ** (scheme.bits - 1)
        return scaled.round().clamp_(-half, half - 1)
    if scheme.grid == FP8:
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(scaled.dtype)
    values = torch.tensor(E2M1, dtype=scaled.dtype, device=scaled.device)
    between = (values[1:] + values[:-1]) / 2
    return values[torch.bucketize(scaled.abs(), between)] * scaled.sign()


def search_scales(
    weight: Float[Tensor, "rows width"],
    importance: Float[Tensor, " width"],
    scheme: Scheme,
    *,
    stored: torch.dtype,
) -> Scales:
    """Return the scales of least ``sum_j h_j (w_j - q_j)^2`` in each group.

    Args:
        weight: of any dtype.
        importance: h, the diagonal of the Gram matrix of the inputs.
        scheme: the grid.
        stored: dtype of the scales of integers and of FP8.
    """
    groups = scheme.groups(weight.shape[1])
    h = importance.to(torch.float32).reshape(1, groups, -1)
    common = 1.0
    if scheme.grid == NVFP4:  # so that the largest scale is the largest of e4m3
        common = E4M3_MAX * E2M1[-1] / max(float(weight.float().abs().max()), 1e-30)
    found = []
    for rows in torch.split(weight, ROWS):
        w = rows.to(torch.float32).reshape(len(rows), groups, -1)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for shrink in SHRINKS:
            scale, zero = _scale(w, shrink, scheme, stored=stored, common=common)
            codes = nearest(w / scale[..., None] + zero[..., None], scheme)
            lost = (codes - zero[..., None]).mul_(scale[..., None]).sub_(w).square_().mul_(h)
            lost = lost.sum(-1)
            if best is None:
                best = lost, scale, zero
                continue
            better = lost < best[0]
            best = (torch.where(better, lost, best[0]), torch.where(better, scale, best[1]),
                    torch.where(better, zero, best[2]))  # fmt: skip
        assert best is not None  # there are shrinks
        found.append(best[1:])
    scale, zero = (torch.cat(each) for each in zip(*found, strict=True))
    return Scales(scale=scale, zero=zero, common=common)


def _scale(
    w: Float[Tensor, "rows groups group"],
    shrink: float,
    scheme: Scheme,
    *,
    stored: torch.dtype,
    common: float,
) -> tuple[Tensor, Tensor]:
    """Return scale and zero of each group where the largest is shrunk."""
    low, high = w.amin(-1), w.amax(-1)
    most = torch.maximum(-low, high)
    zero = torch.zeros_like(most)
    if scheme.grid == INT:
        steps = 2**scheme.bits - 1
        if scheme.symmetric:
            scale = most * (2 * shrink / steps)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) * (shrink / steps)
        scale = _representable(scale, stored)
        if not scheme.symmetric:
            half = 2.0 ** (scheme.bits - 1)
            zero = ((-low * shrink / scale).round() - half).clamp(-half, half - 1)
        return scale, zero
    if scheme.grid == FP8:
        return _representable(most * (shrink / E4M3_MAX), stored), zero
    scale = most * (shrink / E2M1[-1])
    if scheme.grid == MXFP4:
        scale = torch.exp2(torch.log2(scale.clamp_min(2.0**-126)).round().clamp(-126, 127))
        return scale, zero
    local = (scale * common).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return local / common, zero


def _representable(scale: Tensor, stored: torch.dtype) -> Tensor:
    """Return scales as they are stored, none of them zero."""
    return scale.clamp_min(torch.finfo(stored).tiny).to(stored).to(torch.float32)


def round_to_nearest(
    weight: Float[Tensor, "rows width"],
    importance: Float[Tensor, " width"],
    scheme: Scheme,
    *,
    stored: torch.dtype,
) -> Rounded:
    """Return every weight at the nearest value of its grid; see `search_scales`."""
    return at_nearest(weight, search_scales(weight, importance, scheme, stored=stored), scheme)


def at_nearest(weight: Float[Tensor, "rows width"], scales: Scales, scheme: Scheme) -> Rounded:
    """Return every weight at the nearest value of a grid of these scales."""
    width = weight.shape[1]
    scale, zero = (_by_column(each, width) for each in (scales.scale, scales.zero))
    codes = nearest(weight.to(torch.float32) / scale + zero, scheme)
    return Rounded(codes=codes, scales=scales, scheme=scheme)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """The Cholesky factor of a Gram matrix, for all linears that read its inputs.

    Attributes:
        lower: L, with ``H[order][:, order]`` damped; float64.
        order: inputs, the least active first.
        importance: the diagonal of H.
        rung: of the damping ladder at which it was factored.
    """

    lower: Float[Tensor, "width width"]
    order: Int[Tensor, " width"]
    importance: Float[Tensor, " width"]
    rung: str


def factor_of(gram: Symmetric, *, where: str) -> Factor:
    """Return the factor of a Gram matrix.

    Args:
        gram: of the inputs.
        where: names layer and tap in errors.

    Raises:
        NumericsError: the matrix is not finite, or not positive semi-definite on any rung.
    """
    importance = diagonal(gram)
    order = torch.argsort(importance, stable=True)
    lower, rung = cholesky_psd(gram, ridge=DAMP, where=where, order=order)
    return Factor(lower=lower, order=order, importance=importance, rung=rung)


def round_columns(
    rows: Sequence[tuple[Float[Tensor, "_ width"], Scheme]],
    factor: Factor,
    *,
    stored: torch.dtype,
) -> list[Rounded]:
    """Return matrices that read the same inputs, rounded column by column, all in one pass.

    Rows do not depend on each other, so this is as if each were rounded by itself.

    Args:
        rows: matrices with their schemes.
        factor: of the Gram matrix of the inputs.
        stored: dtype of their scales.
    """
    scales = [search_scales(w, factor.importance, s, stored=stored) for w, s in rows]
    order = factor.order
    # Columns as rows, so that one column of all matrices is contiguous. Codes take their place.
    columns = _by_column_order([w for w, _ in rows], order)
    differences = columns.clone()  # until a column is rounded it is the column itself
    grid = _ColumnGrid(rows, scales, order)
    width = len(order)
    for last in range(width, 0, -PANEL):
        first = max(0, last - PANEL)
        panel = slice(first, last)
        below = factor.lower[first:, panel].to(torch.float32)
        below /= below.diagonal().clone()
        if last < width:
            columns[panel].addmm_(below[last - first :].T, differences[last:])
        _round_panel(columns[panel], differences[panel], below[: last - first], grid, first)
    del differences
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    codes = columns[back].T
    del columns
    parts = torch.split(codes, [len(w) for w, _ in rows])
    return [
        Rounded(codes=part.contiguous(), scales=each, scheme=scheme)
        for part, each, (_, scheme) in zip(parts, scales, rows, strict=True)
    ]


def _by_column_order(
    weights: Sequence[Float[Tensor, "_ width"]], order: Int[Tensor, " width"]
) -> Float[Tensor, "width all_rows"]:
    """Return the columns of matrices side by side, in float32, with a copy of few rows beside."""
    found = torch.empty(len(order), sum(map(len, weights)), device=order.device)
    first = 0
    for weight in weights:
        for rows in torch.split(weight, ROWS):
            found[:, first : first + len(rows)] = rows.to(torch.float32)[:, order].T
            first += len(rows)
    return found


class _ColumnGrid:
    """Rounds one column of several matrices, which all have the same kind of grid."""

    def __init__(
        self,
        rows: Sequence[tuple[Float[Tensor, "_ width"], Scheme]],
        scales: Sequence[Scales],
        order: Int[Tensor, " width"],
    ) -> None:
        self._scheme = rows[0][1]
        assert all(scheme.grid == self._scheme.grid for _, scheme in rows)
        self._scales = [(each.scale.T.contiguous(), each.zero.T.contiguous()) for each in scales]
        self._symmetric = all(scheme.symmetric for _, scheme in rows)
        self._groups = [
            [0] * len(order) if s.group == WHOLE_ROW else (order // s.group).tolist()
            for _, s in rows
        ]
        halves = [torch.full((len(w),), 2.0 ** (s.bits - 1)) for w, s in rows]
        self._half = torch.cat(halves).to(order.device)

    def codes(self, goal: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Return the codes of a column, by its place in the order, and their values."""
        own = [(*each, places[at]) for each, places in zip(self._scales, self._groups, strict=True)]
        scale = _side_by_side([scale[group] for scale, _, group in own])
        if self._scheme.grid != INT:
            codes = nearest(goal / scale, self._scheme)
            return codes, codes * scale
        scaled = goal / scale
        if self._symmetric:
            codes = torch.clamp(scaled.round_(), -self._half, self._half - 1)
            return codes, codes * scale
        zero = _side_by_side([zero[group] for _, zero, group in own])
        codes = torch.clamp(scaled.add_(zero).round_(), -self._half, self._half - 1)
        return codes, (codes - zero) * scale


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _round_panel(
    columns: Float[Tensor, "width rows"],
    differences: Float[Tensor, "width rows"],
    below: Float[Tensor, "width width"],
    grid: _ColumnGrid,
    first: int,
) -> None:
    """Round columns in place, the second half before the first, few of them one by one.

    Args:
        columns: what each is to be rounded to; replaced by codes.
        differences: the columns as they were; replaced by their errors.
        below: the corner of L, each column over its pivot.
        grid: of the values.
        first: place of the first column in the order.
    """
    width = len(columns)
    if width <= LEAF:
        for j in range(width - 1, -1, -1):
            codes, values = grid.codes(columns[j], first + j)
            lost = differences[j].sub_(values)
            columns[j].copy_(codes)
            if j:
                columns[:j].addr_(below[j, :j], lost)
        return
    middle = width // 2
    rest = slice(middle, width)
    _round_panel(columns[rest], differences[rest], below[rest, rest], grid, first + middle)
    columns[:middle].addmm_(below[rest, :middle].T, differences[rest])
    start = slice(0, middle)
    _round_panel(columns[start], differences[start], below[start, start], grid, first)


def relative_errors(
    weight: Float[Tensor, "rows width"], rounded: Rounded, gram: Symmetric
) -> tuple[float, float]:
    """Return ``tr(D H D^T) / tr(W H W^T)``, D the error of rounding, and of that to the nearest.

    Of more than `SAMPLED` rows some are taken, evenly: all would take longer than the rounding.

    Args:
        weight: W.
        rounded: by its scales every weight is rounded to the nearest, too.
        gram: H, of the inputs.
    """
    step = -(-len(weight) // SAMPLED)
    w, own = weight[::step].to(torch.float64), rounded.rows(step)
    plain = at_nearest(weight[::step], own.scales, own.scheme)
    energy = _energy(w, gram).clamp_min(1e-300)
    lost, lost_nearest = (_energy(each.values() - w, gram) for each in (own, plain))
    return float(lost / energy), float(lost_nearest / energy)


def _energy(w: Float[Tensor, "rows width"], gram: Symmetric) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    for block, upper in whole_blocks(gram):
        part = w[:, block.first : block.last]
        products = part @ upper  # the square on the diagonal, and what is right
        own = products[:, : block.last - block.first]
        total += (own * part).sum() + 2 * (
            products[:, block.last - block.first :] * w[:, block.last :]
        ).sum()
    return total


def _by_column(each: Float[Tensor, "rows groups"], width: int) -> Float[Tensor, "rows width"]:
    return each.repeat_interleave(width // each.shape[1], dim=1)
