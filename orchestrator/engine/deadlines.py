"""How long a call should take, from what calls of its kind took in this run."""

from collections import defaultdict
from statistics import median

TIMES = 5.0  # a call that takes so many times as long as its kind usually does is stalled
FLOOR_SECONDS = 15.0  # below that, a busy machine explains everything
WITHOUT_SAMPLE_SECONDS = 900.0  # before anything is known of a kind
MAX_SAMPLES = 200


class Deadlines:
    """The seconds that calls of each kind took, and from them when one is late."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def took(self, kind: str, seconds: float) -> None:
        """Note how long a call of a kind took."""
        samples = self._seconds[kind]
        samples.append(seconds)
        del samples[:-MAX_SAMPLES]

    def expected(self, kind: str) -> float | None:
        """Return the median seconds of a kind, or None where nothing is known of it."""
        samples = self._seconds.get(kind)
        return median(samples) if samples else None

    def limit(self, kind: str) -> float:
        """Return after how many seconds a call of a kind is stalled."""
        expected = self.expected(kind)
        if expected is None:
            return WITHOUT_SAMPLE_SECONDS
        return max(FLOOR_SECONDS, TIMES * expected)

    def fits(self, kind: str, *, begun_seconds_ago: float, left: float) -> bool:
        """Return whether a call that has begun will be over before so many seconds are left."""
        expected = self.expected(kind)
        return expected is not None and expected - begun_seconds_ago < left
