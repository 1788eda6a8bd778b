"""The kinds of statistics, one row each; what is done with tensors is in `actors.statistics.kinds`.

A statistic is named ``TAP.KIND``. Behind the name of a kind may stand a number, as in
``probe8192``: the tokens that are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from planners.model.form import LayerForm
from planners.model.packing import packed_elements


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticKind:
    """One kind of statistic.

    Attributes:
        name: of the kind, without a number.
        dims: (width of the tap, layer, number) -> the shape of what a layer holds of it.
        with_mean: the sum of x is kept beside it.
        columns: (width of the tap, layer) -> those of each Gram matrix in it; 0 where it is none.
        packed: it is one Gram matrix of the whole tap, of which the upper triangle is kept.
        normed: it is of a copy of x.
        of_change: it compares what enters a layer with what leaves it, so every layer has it.
    """

    name: str
    dims: Callable[[int, LayerForm, int], tuple[int, ...]]
    with_mean: bool = False
    columns: Callable[[int, LayerForm], int] = lambda _dim, _layer: 0
    packed: bool = False
    normed: bool = False
    of_change: bool = False

    def elements(self, dim: int, layer: LayerForm, number: int) -> int:
        """Return the numbers that a layer holds of it, with the sum of x where that is kept."""
        return prod(self.dims(dim, layer, number)) + (dim if self.with_mean else 0)


KINDS = {
    kind.name: kind
    for kind in (
        StatisticKind(  # x^T x
            name="gram",
            dims=lambda dim, _layer, _number: (packed_elements(dim),),
            with_mean=True,
            columns=lambda dim, _layer: dim,
            packed=True,
        ),
        StatisticKind(  # of x / rms(x)
            name="normed_gram",
            dims=lambda dim, _layer, _number: (packed_elements(dim),),
            columns=lambda dim, _layer: dim,
            packed=True,
            normed=True,
        ),
        StatisticKind(  # one a head
            name="head_gram",
            dims=lambda dim, layer, _number: (
                dim // layer.vo_head_dim, layer.vo_head_dim, layer.vo_head_dim,
            ),
            with_mean=True,
            columns=lambda _dim, layer: layer.vo_head_dim,
        ),
        StatisticKind(  # the squares of each rope pair of each head
            name="pair_energy",
            dims=lambda dim, layer, _number: (dim // layer.qk_head_dim, layer.qk_head_dim // 2),
        ),
        StatisticKind(  # between what enters a layer and what leaves it
            name="cosine", dims=lambda _dim, _layer, _number: (1,), of_change=True
        ),
        StatisticKind(  # the activations of so many tokens, no sum
            name="probe", dims=lambda dim, _layer, number: (number, dim)
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
