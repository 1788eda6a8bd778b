"""A curve as one line of text."""

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"  # `orchestrator.cli.output` has a letter for each where they cannot be encoded


def sparkline(values: Sequence[float], *, width: int) -> str:
    """Return values as blocks from the lowest to the tallest; neighbours are averaged to fit."""
    shown = averaged(values, most=width)
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = high - low or 1.0  # a level line is a low one
    return "".join(BLOCKS[round((each - low) / span * (len(BLOCKS) - 1))] for each in shown)


def averaged(values: Sequence[float], *, most: int) -> list[float]:
    """Return at most so many means of neighbours, in order; few values are as they are."""
    count = min(len(values), most)
    cuts = [number * len(values) // count for number in range(count + 1)] if count else []
    parts = (values[start:end] for start, end in pairwise(cuts))
    return [sum(part) / len(part) for part in parts]
