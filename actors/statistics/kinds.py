"""What is done with the tensors of each kind of statistic.

All else of a kind is in `planners.model.statistic_kinds`, under the same name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.numerics.gram import accumulate, rms_normed
from actors.numerics.packed import Symmetric, congruence, packed


class Add(Protocol):
    """Adds the activations of some tokens to a sum, in place."""

    def __call__(self, x: Tensor, *, total: Tensor) -> None:
        """``x`` is (sequences, tokens, width)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """What is done with one kind.

    Attributes:
        add: activations at its tap to its sum; None where more than a tap is needed.
        rotate: (what is held, map of the tap) -> what is held once the tap is mapped; None where a
            rotation of the residual stream leaves it as it is.
    """

    add: Add | None = None
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None


def _add_gram(x: Tensor, *, total: Tensor) -> None:
    accumulate(total, x.flatten(0, -2))  # (tokens, dim)


def _add_normed_gram(x: Tensor, *, total: Tensor) -> None:
    accumulate(total, rms_normed(x.flatten(0, -2)))


def _add_head_grams(x: Tensor, *, total: Tensor) -> None:
    heads, head_dim = total.shape[0], total.shape[1]
    per_head = x.flatten(0, -2).to(torch.float32).reshape(-1, heads, head_dim).transpose(0, 1)
    total.add_(per_head.transpose(1, 2) @ per_head)  # (heads, head_dim, head_dim)


def _add_pair_energy(x: Tensor, *, total: Tensor) -> None:
    heads, pairs = total.shape
    energy = x.flatten(0, -2).to(torch.float32).square().sum(dim=0).reshape(heads, -1)
    rotated = energy[:, : 2 * pairs].reshape(heads, 2, pairs)
    total.add_(rotated.sum(dim=1))  # channels i and i + rotary / 2 rotate together


def _add_adjacent_pair_energy(x: Tensor, *, total: Tensor) -> None:
    heads, pairs = total.shape
    energy = x.flatten(0, -2).to(torch.float32).square().sum(dim=0).reshape(heads, -1)
    total.add_(energy[:, : 2 * pairs].reshape(heads, pairs, 2).sum(dim=2))  # channels 2i and 2i + 1


def _rotated_gram(total: Symmetric, map_: Tensor) -> Tensor:
    return packed(congruence(map_.T, total))


def rotated_rows(rows: Tensor, map_: Tensor) -> Tensor:
    """Return activations, or a sum of them, once their tap is mapped."""
    return rows.to(torch.float64) @ map_


FUNCTIONS = {
    "gram": Functions(add=_add_gram, rotate=_rotated_gram),
    "normed_gram": Functions(add=_add_normed_gram, rotate=_rotated_gram),
    "head_gram": Functions(add=_add_head_grams),
    "pair_energy": Functions(add=_add_pair_energy),
    "adjacent_pair_energy": Functions(add=_add_adjacent_pair_energy),
    "cosine": Functions(),
    "probe": Functions(rotate=rotated_rows),
}
