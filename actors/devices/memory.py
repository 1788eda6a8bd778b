"""Measure the peak memory of this process or its device; return freed memory to the system."""

import ctypes
import threading
import time
import weakref
from pathlib import Path

import pyarrow as pa
import torch

SAMPLE_SECONDS = 0.02
LARGE_BYTES = 2**20
_MMAP_THRESHOLD = -3  # glibc's number of this setting
_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process; 0 where the system does not report it.

    Mapped files and shared memory (the object store) are not counted.
    """
    if not _STATUS.exists():
        return 0
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def release_freed_memory() -> None:
    """Return freed memory to the system: allocators keep it, which planned peaks do not include."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """Let this process return each large block to the system as soon as it is freed.

    Else glibc keeps what the backward passes of a training free, in pieces that fit nothing else:
    up to half as much memory again as is in use.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None:
        setting(_MMAP_THRESHOLD, LARGE_BYTES)


def _device_bytes() -> int:
    """Return the peak memory of the device since a `PeakMemory` last began."""
    return int(torch.cuda.max_memory_allocated())


class PeakMemory:
    """Samples anonymous memory in a thread and keeps the peak above the initial value.

    On a GPU it is the device memory that torch has allocated.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._used = anonymous_bytes
        if device == "cuda":
            self._used = _device_bytes
            torch.cuda.reset_peak_memory_stats()  # an earlier PeakMemory keeps its samples
        self._baseline = self._used()
        self._peak = self._baseline
        watching = threading.Thread(
            target=_watch, args=(weakref.ref(self),), daemon=True, name="peak-memory"
        )
        watching.start()

    def bytes(self) -> int:
        """Return the peak above the baseline so far."""
        self._peak = max(self._peak, self._used())
        return self._peak - self._baseline


def _watch(watched: weakref.ref[PeakMemory]) -> None:
    """Sample until the `PeakMemory` is garbage collected: else the thread would leak."""
    while (memory := watched()) is not None:
        memory.bytes()
        del memory
        time.sleep(SAMPLE_SECONDS)
