"""Align a layer with another one: permute, sign and rotate its inner channels; it stays the same.

Layers that are trained alike differ in the order of their heads and MLP units, in the basis of
each value head and in the phase of each rope pair, none of which the function of a layer depends
on. Here these are chosen so that the sum of squared differences between the linears of the layer
and those of the other is smallest. As every map is orthogonal, that is where the *gain* is largest:
the inner product of the linears of the two. Which maps there are, say the groups of the spaces
(`planners.model.layer`):

- ``mlp``: the order of the units, by an exact assignment; in a gated MLP also the sign of each unit
  in up_proj and down_proj. gate_proj has no sign: its activation is not odd.
- ``vo``: a rotation of each KV head (Procrustes over v_proj and the columns of o_proj of all query
  heads that read it).
- ``qk``: an angle for each rope pair of each KV head, and a rotation of the channels without rope.
  Where q and k are normalised, nothing.
- The order of the KV heads, by an exact assignment, and of the query heads within each: all
  orders of up to `ALL_ORDERS` are tried. That of more depends on the rotations and they on it, so
  both are improved in turn, to an optimum that need not be the best.

What brings less than `TIE` is left as it is: an aligned layer is not changed by another alignment.

Rows are outputs, as in torch's (out, in) orientation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from actors.numerics.linalg import BLOCK
from actors.numerics.packed import Symmetric, permuted, unpacked, whole_blocks
from planners.model.form import LayerForm
from planners.model.layer import LayerKind
from planners.model.shape import ModelShape

Weights = Mapping[str, Tensor]
TIE = 1e-13  # of a gain: less is rounding
ALL_ORDERS = 4  # query heads of a KV head of which every order is tried
READ_BY = {"o_proj", "down_proj"}  # their columns are inner channels; of the others, the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A permutation of heads, and an orthogonal map of each; a unit of an MLP is a head of one.

    Attributes:
        order: the old place of each head.
        turns: the map from the old channels of a head to the new ones, float64.
    """

    order: Int[Tensor, " heads"]
    turns: Float[Tensor, "heads width width"]

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        same = torch.equal(self.order, torch.arange(len(self.order)).to(self.order))
        return same and torch.equal(
            self.turns, torch.eye(self.width).to(self.turns).expand_as(self.turns)
        )

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.turns.shape[-1]

    def rows(self, matrix: Tensor) -> Tensor:
        """Return what has a row for each channel, or an element, with the channels moved."""
        heads = matrix.to(torch.float64).reshape(len(self.order), self.width, -1)[self.order]
        return (self.turns @ heads).reshape(matrix.shape).to(matrix.dtype)

    def gram(self, total: Symmetric) -> Symmetric:
        """Return the Gram matrix of moved channels, packed if that of the old ones is."""
        starts = self.order[:, None] * self.width
        channels = (starts + torch.arange(self.width, device=starts.device)).flatten()
        upper = permuted(total, channels).T
        if self.width == 1:  # of many units: in place
            upper.mul_(self.turns.flatten()).mul_(self.turns.reshape(-1, 1))
        else:
            turn = replace(self, order=torch.arange(len(self.order), device=starts.device))
            upper = turn.rows(turn.rows(unpacked(upper)).T)
        if total.ndim > 1:
            return unpacked(upper)
        return torch.cat([rows.flatten() for _, rows in whole_blocks(upper)])

    def head_grams(
        self, total: Float[Tensor, "heads width width"]
    ) -> Float[Tensor, "heads width width"]:
        """Return the Gram matrix of each moved head."""
        return self.turns @ total[self.order] @ self.turns.mT


def aligned(
    weights: Weights,
    source: Weights,
    sums: Mapping[str, Tensor],
    *,
    shape: ModelShape,
    form: LayerForm,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a layer that computes the same and is as near as possible to another, and its sums.

    Args:
        weights: role -> tensor of the layer.
        source: the same of the other layer.
        sums: statistic name -> sum; those of channels that move are moved along, or left out where
            the kind of statistic cannot be.
        shape: of the model.
        form: of the layer, uncut.
    """
    kind = shape.kind(form)
    moves = _head_moves(weights, source, shape=shape, kind=kind)
    if kind.space("mlp").group == "permutation":
        moves |= _unit_moves(weights, source)
    moves = {role: move for role, move in moves.items() if not move.is_identity}
    new = dict(weights)
    for role, move in moves.items():
        name, bias = f"{role}.weight", f"{role}.bias"
        if role in READ_BY:
            new[name] = move.rows(weights[name].T).T.contiguous()
            continue
        new[name] = move.rows(weights[name])
        if bias in weights:
            new[bias] = move.rows(weights[bias])
    return new, _moved(sums, moves, kind)


def _moved(
    sums: Mapping[str, Tensor], moves: Mapping[str, Move], kind: LayerKind
) -> dict[str, Tensor]:
    of_linear = {
        "q_rope": "q_proj",
        "k_rope": "k_proj",
        "v": "v_proj",
        "o_in": "o_proj",
        "mlp_hidden": "down_proj",
    }
    energy = "pair_energy" if kind.pairs == "half" else "adjacent_pair_energy"
    found = {}
    for name, total in sums.items():
        tap, _, statistic = name.partition(".")
        move = moves.get(of_linear.get(tap, ""))
        if move is None:
            found[name] = total
        elif statistic in ("gram", "normed_gram"):
            found[name] = move.gram(total)
        elif statistic == "head_gram":
            found[name] = move.head_grams(total)
        elif statistic == "sum":
            found[name] = move.rows(total)
        elif statistic == energy:  # an angle leaves the energy of its pair as it is
            found[name] = total[move.order]
    return found


def _rows(weights: Weights, role: str) -> Float[Tensor, "rows columns"]:
    """Return a row for each inner channel, with its bias as one more column, in float64."""
    weight = weights[f"{role}.weight"].to(torch.float64)
    if role in READ_BY:
        return weight.T
    bias = weights.get(f"{role}.bias")
    return weight if bias is None else torch.cat((weight, bias[:, None].to(weight)), dim=1)


def _assigned(gains: Float[Tensor, "new old"]) -> Int[Tensor, " new"]:
    """Return the permutation with the largest gain: an old one for each new one.

    ``gains`` are negated in place and back, as one such matrix of MLP units may fill the memory.
    """
    own = gains.diagonal().sum()
    gains.neg_()
    _, found = linear_sum_assignment(gains.numpy())
    gains.neg_()
    order = torch.from_numpy(found)
    best = gains.gather(1, order[:, None]).sum()
    return torch.arange(len(gains)) if best - own <= TIE * best.abs() else order


# The units of an MLP.


def _unit_moves(weights: Weights, source: Weights) -> dict[str, Move]:
    is_gated = "gate_proj.weight" in weights
    old, new = (_units(each, is_gated) for each in (weights, source))
    order = _assigned(_unit_gains(old, new)).to(old[0].device)
    signs = torch.ones(len(order)).to(old[0])
    if is_gated:
        for rows in torch.split(torch.arange(len(order)).to(order), BLOCK):
            gain = (new[1][rows] * old[1][order[rows]]).sum(dim=1)
            signs[rows] = torch.where(gain < 0, -1.0, signs[rows])
    units = Move(order=order, turns=signs[:, None, None])
    moves = {"up_proj": units, "down_proj": units}
    if is_gated:
        moves["gate_proj"] = replace(units, turns=torch.ones_like(units.turns))
    return moves


def _units(weights: Weights, is_gated: bool) -> list[Float[Tensor, "units columns"]]:
    """Return what of a unit has no sign, and, in a gated MLP, what has one."""
    both = torch.cat((_rows(weights, "up_proj"), _rows(weights, "down_proj")), dim=1)
    return [_rows(weights, "gate_proj"), both] if is_gated else [both]


def _unit_gains(old: list[Tensor], new: list[Tensor]) -> Float[Tensor, "new old"]:
    """Return the gain of each unit in each place, with the better sign, in blocks of rows."""
    gains = torch.empty(len(new[0]), len(old[0]), dtype=torch.float64)
    for first in range(0, len(gains), BLOCK):
        rows = slice(first, first + BLOCK)
        found = new[0][rows] @ old[0].T
        if len(new) > 1:
            found += (new[1][rows] @ old[1].T).abs_()
        gains[rows] = found
    return gains


# The heads.


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Channels of a KV head that are mapped block by block, in all linears alike.

    Attributes:
        own: the linear with one such head.
        each: the linear with as many as there are query heads.
        channels: of each block.
        nearest: products of blocks of rows, new times old, transposed -> the maps in the group with
            the largest gain.
    """

    own: str
    each: str
    channels: Int[Tensor, "blocks width"]
    nearest: Callable[[Tensor], Tensor]

    def products(self, role: str, weights: Weights, source: Weights, heads: int) -> Tensor:
        """Return ``new @ old^T`` of each block for all pairs of heads: (new, old, blocks, w, w)."""
        blocks, width = self.channels.shape
        old, new = (
            rows.reshape(heads, -1, rows.shape[1])[:, self.channels].permute(1, 0, 2, 3)
            for rows in (_rows(weights, role), _rows(source, role))
        )  # (blocks, heads, width, columns)
        found: Tensor = (
            new.reshape(blocks, heads * width, -1) @ old.reshape(blocks, heads * width, -1).mT
        )
        return found.reshape(blocks, heads, width, heads, width).permute(1, 3, 0, 2, 4).cpu()

    def best(self, products: Float[Tensor, "blocks width width"]) -> Tensor:
        """Return the map of each block with the largest gain, the identity if it is as good."""
        found, same = self.nearest(products), torch.eye(products.shape[-1]).to(products)
        gain, own = (_gain(products, each)[..., None, None] for each in (found, same))
        return torch.where(gain - own <= TIE * gain.abs(), same, found)


def _gain(products: Tensor, turns: Tensor) -> Tensor:
    return (products * turns).sum(dim=(-2, -1))


def _orthogonal(products: Float[Tensor, "blocks width width"]) -> Tensor:
    """Return the orthogonal maps with the largest gain (Procrustes)."""
    left, _, right = torch.linalg.svd(products)
    found: Tensor = left @ right
    return found


def _turned(products: Float[Tensor, "blocks two two"]) -> Tensor:
    """Return the rotations of the plane with the largest gain: those that commute with rope."""
    cos = products[..., 0, 0] + products[..., 1, 1]
    sin = products[..., 1, 0] - products[..., 0, 1]
    size = torch.hypot(cos, sin)
    cos, sin = torch.where(size > 0, cos / size, 1.0), torch.where(size > 0, sin / size, 0.0)
    return torch.stack((cos, -sin, sin, cos), dim=-1).reshape(products.shape)


def _unchanged(products: Float[Tensor, "blocks width width"]) -> Tensor:
    return torch.eye(products.shape[-1]).to(products).expand_as(products)


def _parts(kind: LayerKind, head_dim: int) -> list[Part]:
    """Return the parts of a head by the groups of its spaces."""
    every, rope = torch.arange(head_dim), kind.rotary
    pairs = every[:rope].reshape(2, -1).T if kind.pairs == "half" else every[:rope].reshape(-1, 2)

    def part(own: str, each: str, channels: Tensor, nearest: Callable[[Tensor], Tensor]) -> Part:
        return Part(own=own, each=each, channels=channels, nearest=nearest)

    values = [part("v_proj", "o_proj", every[None], _orthogonal)]
    if kind.space("vo").group == "none":
        values = [part("v_proj", "o_proj", every[:, None], _unchanged)]
    if kind.space("qk").group == "none":
        return [*values, part("k_proj", "q_proj", every[:, None], _unchanged)]
    rotated = [part("k_proj", "q_proj", pairs, _turned)] if rope else []
    rest = [part("k_proj", "q_proj", every[None, rope:], _orthogonal)] if rope < head_dim else []
    return [*values, *rotated, *rest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One KV head in the place of another.

    Attributes:
        gain: with the best maps.
        order: the old place within the KV head of each of its query heads.
        turns: the maps of the blocks of each part.
    """

    gain: float
    order: Int[Tensor, " group"]
    turns: list[Tensor]


@dataclass(frozen=True, slots=True)
class HeadProducts:
    """The products of a KV head of the layer and one of the source, for each part.

    Attributes:
        parts: of heads.
        own: of the part's ``own`` linear: (blocks, w, w).
        each: of its ``each``: (new query heads, old ones, blocks, w, w).
    """

    parts: list[Part]
    own: list[Tensor]
    each: list[Tensor]

    def best(self) -> Match:
        """Return the match with the largest gain: of all orders of few query heads.

        Of more, the better of the two that are reached from these orders: as they are, so that the
        gain is never smaller than it was, and by the maps that k and v alone ask for, which leads
        back where the layer is the source with its channels moved.
        """
        same = torch.arange(len(self.each[0]))
        if len(same) <= ALL_ORDERS:
            matches = (self._match(torch.tensor(order)) for order in permutations(same.tolist()))
        else:
            alone = [part.best(own) for part, own in zip(self.parts, self.own, strict=True)]
            matches = (self._climbed(order) for order in (same, self._order(alone)))
        found = next(matches)
        for other in matches:
            found = other if _is_better(other, found) else found
        return found

    def _climbed(self, order: Tensor) -> Match:
        found = self._match(order)
        while True:
            better = self._match(self._order(found.turns))
            if not _is_better(better, found):
                return found
            found = better

    def _match(self, order: Tensor) -> Match:
        """Return the match with the best maps for an order of query heads."""
        places = torch.arange(len(order))
        products = [
            own + each[places, order].sum(dim=0)
            for own, each in zip(self.own, self.each, strict=True)
        ]
        turns = [part.best(each) for part, each in zip(self.parts, products, strict=True)]
        gain = sum(float(_gain(*each).sum()) for each in zip(products, turns, strict=True))
        return Match(gain=gain, order=order, turns=turns)

    def _order(self, turns: list[Tensor]) -> Tensor:
        """Return the best order of query heads for some maps."""
        gains = [_gain(*each).sum(dim=-1) for each in zip(self.each, turns, strict=True)]
        return _assigned(torch.stack(gains).sum(dim=0))


def _is_better(match: Match, than: Match) -> bool:
    return match.gain - than.gain > TIE * abs(match.gain)


def _head_moves(
    weights: Weights, source: Weights, *, shape: ModelShape, kind: LayerKind
) -> dict[str, Move]:
    heads, kv_heads, parts = shape.num_heads, shape.num_kv_heads, _parts(kind, shape.head_dim)
    group = heads // kv_heads
    own = [part.products(part.own, weights, source, kv_heads) for part in parts]
    groups = (kv_heads, group, kv_heads, group)
    each = []  # of (new KV heads, old ones, new query heads, old ones, blocks, w, w)
    for part in parts:
        found = part.products(part.each, weights, source, heads)
        each.append(found.reshape(*groups, *found.shape[2:]).transpose(1, 2))
    matches = [
        [
            HeadProducts(parts, [x[new, old] for x in own], [x[new, old] for x in each]).best()
            for old in range(kv_heads)
        ]
        for new in range(kv_heads)
    ]
    gains = [[match.gain for match in row] for row in matches]
    order = _assigned(torch.tensor(gains, dtype=torch.float64))
    chosen = [row[old] for row, old in zip(matches, order.tolist(), strict=True)]
    queries = torch.cat([old * group + x.order for old, x in zip(order, chosen, strict=True)])
    moves = {}
    for role_own, role_each in (("v_proj", "o_proj"), ("k_proj", "q_proj")):
        turns = torch.stack([_whole(parts, x.turns, role_own, shape.head_dim) for x in chosen])
        turns = turns.to(weights["v_proj.weight"].device)
        moves[role_own] = Move(order=order.to(turns.device), turns=turns)
        every = turns.repeat_interleave(group, dim=0)
        moves[role_each] = Move(order=queries.to(turns.device), turns=every)
    return moves


def _whole(
    parts: list[Part], turns: list[Tensor], own: str, head_dim: int
) -> Float[Tensor, "head_dim head_dim"]:
    """Return the map of a head that consists of those of its blocks."""
    found = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for part, blocks in zip(parts, turns, strict=True):
        if part.own == own:
            found[part.channels[:, :, None], part.channels[:, None, :]] = blocks
    return found
