"""What holds for every refusal: its class, a short message, little time and little memory."""

import contextlib
import gc
import resource
import time
from pathlib import Path

import pytest

from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from planners.errors import CompressionError

SECONDS = 5.0  # of the processor: a machine that is busy with other things fails no test
BYTES = 10**9
_STATUS = Path("/proc/self/status")


@contextlib.contextmanager
def within_limits():
    """Fail on what takes more than 5 s, or asks for more than 1 GB beyond what is in use."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = _address_space()
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    gc.freeze()  # what earlier tests left is not looked through again for every object parsed here
    started = time.process_time(), time.monotonic()
    try:
        yield
    finally:
        gc.unfreeze()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - started[0] < SECONDS
    assert time.monotonic() - started[1] < 10 * SECONDS, "it waits for something"


def _address_space():
    """Return the bytes this process has mapped, or 0 where the system does not say."""
    if not _STATUS.exists():
        return 0
    sizes = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(sizes["VmSize"].split()[0]) * 1024


def refusal(error_class, call, *words):
    """Return message and hint of the refusal of a call, which must hold these words."""
    with within_limits(), pytest.raises(CompressionError) as caught:
        call()
    assert type(caught.value) is error_class
    message = str(caught.value)
    lines = message.splitlines()
    assert len(lines) <= 2
    assert all(line.isprintable() for line in lines), "a terminal would obey it"
    assert len(message) < 1000
    said = f"{message}; {caught.value.hint}"
    for word in words:
        assert word in said
    return said


def attempt(model, out, *, only_plan=False, **recipe):
    """Pass the door with a model of the fixture ``model``, or raise what it raises."""
    given = {
        "model": str(model),
        "out": str(out),
        "device": "cpu",
        "calibration.source": f"tokens:{model}/tokens/calibration.safetensors",
        "evaluation.source": f"tokens:{model}/tokens/evaluation.safetensors",
        **({} if "keep_fraction" in recipe else {"slice": 0.25}),
        **{key.replace("__", "."): value for key, value in recipe.items()},
    }
    return prepare(load_config(None, given), only_plan=only_plan)
