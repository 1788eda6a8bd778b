"""Peak memory: a spike between two questions is seen, and nothing is left running."""

import ctypes
import mmap
import resource
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from actors.memory import PeakMemory, keep_freed

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


def faults_of_steps(keep):
    """Return the pages that the system cleared while memory was freed and asked for again."""
    keep_freed(keep=keep)
    torch.empty(2**24).fill_(1.0)  # 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="an allocator of its own")
def test_freed_memory_is_kept_or_given_back_as_told():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        kept, given_back = (pool.submit(faults_of_steps, keep).result() for keep in (True, False))
    assert given_back >= 10  # each time, whatever the size of a page
    assert kept < given_back / 5
