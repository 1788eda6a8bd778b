"""Peak memory: a spike between two questions is seen, and nothing is left running."""

import mmap
import sys
import threading
import time

import pytest

from actors.devices.memory import PeakMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is anonymous")
MIB = 2**20


def fill(num_bytes, flags):
    """Use fresh memory for a moment."""
    block = bytes(range(256)) * 16
    with mmap.mmap(-1, num_bytes, flags=flags | mmap.MAP_ANONYMOUS) as memory:
        for _ in range(0, num_bytes, len(block)):
            memory.write(block)
        time.sleep(0.2)


def test_a_spike_that_is_over_is_still_the_peak():
    memory = PeakMemory()
    fill(64 * MIB, mmap.MAP_PRIVATE)
    assert 64 * MIB <= memory.bytes() <= 96 * MIB


def test_shared_memory_is_not_counted():
    memory = PeakMemory()
    fill(64 * MIB, mmap.MAP_SHARED)
    assert memory.bytes() < 32 * MIB


def test_the_watching_ends_with_its_owner():
    before = set(threading.enumerate())
    memory = PeakMemory()
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    del memory
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
