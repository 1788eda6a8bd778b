"""The kinds of statistics, one row each; what is done with tensors is in `actors.statistics.kinds`.

A statistic is named ``TAP.KIND``. Behind the name of a kind may stand a number, as in
``probe8192``: the tokens that are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from planners.model.packing import packed_elements


@dataclass(frozen=True, slots=True, kw_only=True)
class TapDims:
    """The widths at a tap of a layer.

    Attributes:
        dim: of the activations.
        head: of one head, where they are those of heads.
        rotary: channels of a head that rope rotates.
    """

    dim: int
    head: int
    rotary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticKind:
    """One kind of statistic.

    Attributes:
        name: of the kind, without a number.
        dims: (widths at the tap, number) -> the shape of what a layer holds of it.
        with_mean: the sum of x is kept beside it.
        columns: widths at the tap -> those of each Gram matrix in it; 0 where it is none.
        packed: it is one Gram matrix of the whole tap, of which the upper triangle is kept.
        normed: it is of a copy of x.
        of_change: it compares what enters a layer with what leaves it, so every layer has it.
    """

    name: str
    dims: Callable[[TapDims, int], tuple[int, ...]]
    with_mean: bool = False
    columns: Callable[[TapDims], int] = lambda _: 0
    packed: bool = False
    normed: bool = False
    of_change: bool = False

    def elements(self, at: TapDims, number: int) -> int:
        """Return the numbers that a layer holds of it, with the sum of x where that is kept."""
        return prod(self.dims(at, number)) + (at.dim if self.with_mean else 0)


KINDS = {
    kind.name: kind
    for kind in (
        StatisticKind(  # x^T x
            name="gram",
            dims=lambda at, _: (packed_elements(at.dim),),
            with_mean=True,
            columns=lambda at: at.dim,
            packed=True,
        ),
        StatisticKind(  # of x / rms(x)
            name="normed_gram",
            dims=lambda at, _: (packed_elements(at.dim),),
            columns=lambda at: at.dim,
            packed=True,
            normed=True,
        ),
        StatisticKind(  # one a head
            name="head_gram",
            dims=lambda at, _: (at.dim // at.head, at.head, at.head),
            with_mean=True,
            columns=lambda at: at.head,
        ),
        StatisticKind(  # the squares of each rope pair of each head, channels i and i + rotary / 2
            name="pair_energy", dims=lambda at, _: (at.dim // at.head, at.rotary // 2)
        ),
        StatisticKind(  # the same of channels 2i and 2i + 1
            name="adjacent_pair_energy", dims=lambda at, _: (at.dim // at.head, at.rotary // 2)
        ),
        StatisticKind(  # between what enters a layer and what leaves it
            name="cosine", dims=lambda _at, _: (1,), of_change=True
        ),
        StatisticKind(  # the activations of so many tokens, no sum
            name="probe", dims=lambda at, number: (number, at.dim)
        ),
    )
}  # fmt: skip


def parsed(kind: str) -> tuple[StatisticKind, int]:
    """Return the row of a kind and the number behind its name, 0 without one.

    Raises:
        KeyError: there is no such kind.
    """
    name = kind.rstrip("0123456789")
    return KINDS[name], int(kind[len(name) :] or 0)
