"""The calibration tokens: their shards, and whether there are enough for each Gram matrix."""

from collections.abc import Iterable
from itertools import pairwise

from planners.model.cost import dense_start, tap_dims
from planners.model.form import ModelForm
from planners.model.shape import ModelShape
from planners.model.taps import Statistic


def shard_cuts(count: int, num_microbatches: int) -> list[tuple[int, int]]:
    """Return the shards of the calibration tokens as ranges of microbatches; none is empty.

    They follow from the recipe, never from the workers at hand: each is summed by itself, and sums
    of other parts round in other ways.
    """
    count = max(1, min(count, num_microbatches))
    edges = [i * num_microbatches // count for i in range(count + 1)]
    return list(pairwise(edges))


def few_tokens(
    shape: ModelShape,
    statistics: Iterable[Statistic],
    *,
    tokens: int,
    sequence_length: int,
    start: ModelForm | None = None,
) -> str:
    """Return in words which Gram matrices have fewer tokens than columns; empty where none has.

    Such a matrix has no full rank: what a method makes of the directions that no token has is a
    matter of its damping, and fits these tokens and no others. Sums that are no matrix do not mind.

    Args:
        shape: of the model.
        statistics: that the method needs.
        tokens: of calibration.
        sequence_length: of each sequence.
        start: the model whose activations are observed; None is the one that nothing touched.
    """
    layers = (start or dense_start(shape).form).layers
    widths: dict[str, int] = {}  # of several matrices at a tap the widest counts
    for s in statistics:
        each = (s.row.columns(tap_dims(shape, s.tap, layer)) for layer in layers)
        widths[s.tap] = max(widths.get(s.tap, 0), *each)
    narrow = {tap: width for tap, width in sorted(widths.items()) if width > tokens}
    if not narrow:
        return ""
    said = ", ".join(f"{tap} {width:,}" for tap, width in narrow.items())
    enough = -(-max(narrow.values()) // sequence_length)
    return (
        f"{tokens:,} calibration tokens are fewer than the width of the Gram matrix at {said}: "
        f"expect a poor result; --calibration-sequences {enough} is the least, and several times "
        "that is better"
    )
