"""How speeds are measured: the settings of a run, and when a median is known well enough.

Models are timed in turn, round after round. Their ratio in one round is free of whatever slows the
machine for longer than a round; the median of these ratios, and an interval around it, say which
model is faster.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BATCHES = (1, 16)  # of a run; one that takes too long or does not fit is left out
# device -> of a run, which somebody waits for
PROMPT_TOKENS = {"cpu": 64, "cuda": 128}
NEW_TOKENS = {"cpu": 8, "cuda": 16}
RUN_MOST = {"cpu": 16, "cuda": 64}  # sequences in its largest batch, whatever more would fit
BENCH_MOST = {"cpu": 64, "cuda": 256}
FEWEST_ROUNDS, MOST_ROUNDS = 6, 30
STEADY = 0.02  # half of the interval, relative to the median
RUN_SECONDS = 0.4  # of one setting of a run, beyond its first rounds
BENCH_SECONDS = 20.0
BENCH_PATIENCE_SECONDS = 180.0
PATIENCE_SECONDS = 30.0  # a setting of a run is left out if its first rounds would take longer
CONFIDENCE = 0.95

EAGER, GRAPHS, COMPILED = "eager", "CUDA graphs", "torch.compile"  # modes of decoding

Interval = tuple[float, float]


def median_interval(values: Sequence[float]) -> Interval:
    """Return the interval between two order statistics that holds the median.

    It holds the true median with a probability of at least `CONFIDENCE`, whatever the distribution:
    the number of values below it is binomial. Fewer values than six give (0, inf).
    """
    ordered, below = sorted(values), 0
    while 1 - 2 * _at_most(below, len(ordered)) >= CONFIDENCE:
        below += 1
    return (ordered[below - 1], ordered[-below]) if below else (0.0, math.inf)


def steady(ratios: Sequence[float]) -> bool:
    """Return whether the median of the rounds' ratios is known to within `STEADY`."""
    low, high = median_interval(ratios)
    return (high - low) / 2 <= STEADY * statistics.median(ratios)


def finished(
    rounds: Mapping[str, Sequence[Sequence[float]]],
    seconds: float,
    *,
    max_rounds: int,
    max_seconds: float,
) -> bool:
    """Return whether a setting needs no more rounds, or has had its share.

    Args:
        rounds: model -> rounds -> seconds of prompts and of new tokens.
        seconds: since the first round.
        max_rounds: at most.
        max_seconds: after which there are no more rounds than are needed at least.
    """
    count = min(map(len, rounds.values()))
    if count < min(FEWEST_ROUNDS, max_rounds):
        return False
    return count >= max_rounds or seconds >= max_seconds or _known(rounds)


def speeds(rounds: Sequence[Sequence[float]], tokens: tuple[int, int]) -> dict[str, Any]:
    """Return tokens per second of prompts and new tokens, from the seconds of each round.

    Args:
        rounds: seconds of prompts and of new tokens.
        tokens: of each.
    """
    rates = [[count / each for count, each in zip(tokens, pair, strict=True)] for pair in rounds]
    return {
        "prefill_tokens_per_second": statistics.median(rate[0] for rate in rates),
        "decode_tokens_per_second": statistics.median(rate[1] for rate in rates),
        "rounds": rates,
    }


def _known(rounds: Mapping[str, Sequence[Sequence[float]]]) -> bool:
    """Return whether all ratios to the first model are steady, or its own seconds if alone."""
    reference, *others = rounds.values()
    compared = [
        [before[part] / after[part] for before, after in zip(reference, other, strict=True)]
        for other in others
        for part in (0, 1)
    ]
    return all(map(steady, compared or [[each[part] for each in reference] for part in (0, 1)]))


def _at_most(below: int, count: int) -> float:
    """Return the probability that at most so many of ``count`` fair coins show heads."""
    return math.fsum(math.comb(count, k) for k in range(below + 1)) / 2.0**count
