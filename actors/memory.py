"""How much memory of its own this process used at its peak."""

import threading
from pathlib import Path

SAMPLE_SECONDS = 0.02
_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process; 0 where the system does not say.

    Mapped files and shared memory (the object store) are not counted.
    """
    if not _STATUS.exists():
        return 0
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Samples anonymous memory in a thread and keeps the most it saw above where it began."""

    def __init__(self) -> None:
        self._baseline = anonymous_bytes()
        self._peak = self._baseline
        threading.Thread(target=self._watch, daemon=True, name="peak-memory").start()

    def bytes(self) -> int:
        """Return the peak above the baseline so far."""
        self._peak = max(self._peak, anonymous_bytes())
        return self._peak - self._baseline

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, anonymous_bytes())
