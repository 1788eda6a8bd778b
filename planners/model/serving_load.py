"""The load for which a result is made: what it serves at one time, and how long its layers take."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

PREFILL, DECODE = "prefill", "decode"
Points = Sequence[tuple[int, float]]  # (width, seconds), ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLoad:
    """What is served at one time.

    Attributes:
        phase: ``prefill`` of prompts of ``context`` tokens, or ``decode`` of one token behind them.
        batch: sequences.
        context: tokens of each.
    """

    phase: str = DECODE
    batch: int = 1
    context: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """How long the parts of a model take under a load, by their widths.

    Attributes:
        mlp: of one layer's MLP with its norm, by its inner width, ascending, the full one included.
        heads: likewise of attention, by the width of its heads, that of q and k and of v and o.
        outside: of all but the layers, seconds.
    """

    mlp: Points
    heads: Points
    outside: float

    def layer(self, intermediate: int, head_dim: int) -> float:
        """Return the seconds of a layer of these widths."""
        return seconds_at(self.mlp, intermediate) + seconds_at(self.heads, head_dim)


def seconds_at(points: Points, width: int) -> float:
    """Return the time at a width, on the straight line between the measured ones beside it.

    Where a narrower width took longer, its time counts for the wider ones too: so a cut that saves
    no time saves none here, and noise never makes one look worth its damage.
    """
    widths = [each for each, _ in points]
    times = list(accumulate((seconds for _, seconds in points), max))
    place = bisect_left(widths, width)
    if place == len(widths):
        return times[-1]
    if place == 0 or widths[place] == width:
        return times[place]
    share = (width - widths[place - 1]) / (widths[place] - widths[place - 1])
    return times[place - 1] + (times[place] - times[place - 1]) * share


def times_from(found: object) -> LayerTimes:
    """Return the times that a unit measured, as its record has them.

    Raises:
        TypeError: ``found`` is not what such a unit records.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"times are a {type(found).__name__}")
    mlp, heads = ([(int(w), float(s)) for w, s in found[name]] for name in ("mlp", "heads"))
    return LayerTimes(mlp=mlp, heads=heads, outside=float(found["outside"]))
