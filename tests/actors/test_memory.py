"""Peak memory: a spike between two questions is seen, and nothing is left running."""

import gc
import sys
import threading
import time

import pytest
import torch

from actors.memory import PeakMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says anonymous memory")
MIB = 2**20


def test_a_spike_that_is_over_is_still_the_peak():
    memory = PeakMemory()
    spike = torch.ones(64 * MIB, dtype=torch.uint8)
    time.sleep(0.2)
    del spike
    gc.collect()
    assert 60 * MIB <= memory.bytes() <= 100 * MIB


def test_the_watching_ends_with_its_owner():
    before = set(threading.enumerate())
    memory = PeakMemory()
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    del memory
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
