"""How long a call should take, from the calls of its kind in this run."""

from collections import defaultdict
from statistics import median

TIMES = 5.0  # a call is stalled when it takes this many times the median of its kind
FLOOR_SECONDS = 15.0  # a shorter delay may come from a busy machine
WITHOUT_SAMPLE_SECONDS = 900.0  # before the first call of a kind has ended
MAX_SAMPLES = 200


class Deadlines:
    """Durations of the calls of each kind, and the deadlines derived from them."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def took(self, kind: str, seconds: float) -> None:
        """Record how long a call of a kind took."""
        samples = self._seconds[kind]
        samples.append(seconds)
        del samples[:-MAX_SAMPLES]

    def expected(self, kind: str) -> float | None:
        """Return the median seconds of a kind, or None if no call of it has ended."""
        samples = self._seconds.get(kind)
        return median(samples) if samples else None

    def limit(self, kind: str) -> float:
        """Return after how many seconds a call of a kind is stalled."""
        expected = self.expected(kind)
        if expected is None:
            return WITHOUT_SAMPLE_SECONDS
        return max(FLOOR_SECONDS, TIMES * expected)

    def fits(self, kind: str, *, begun_seconds_ago: float, left: float) -> bool:
        """Return whether a running call is likely to end within ``left`` seconds."""
        expected = self.expected(kind)
        return expected is not None and expected - begun_seconds_ago < left
