"""Laws of the interval of a median, of when rounds end, and of the largest batch that fits."""

import math
import random

import pytest

from planners.memory.generation import generation_load, largest_batch, whole_bytes
from planners.model.cost import dense_model_form
from planners.timing import CONFIDENCE, FEWEST_ROUNDS, finished, median_interval, steady
from tests.shapes import llama_shape

SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=4, hidden=256, intermediate=512,
    num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=1000, dtype="float32", tied=False,
)  # fmt: skip
LIMITS = {"max_rounds": 30, "max_seconds": 60.0}


@pytest.mark.parametrize("count", [6, 7, 9, 15, 30])
def test_an_interval_holds_the_true_median_as_often_as_it_promises(count):
    source, trials = random.Random(count), 2000
    held = 0
    for _ in range(trials):
        # Skewed, as times are: a machine is only ever slower than usual.
        low, high = median_interval([source.expovariate(1.0) for _ in range(count)])
        held += low <= math.log(2) <= high
    assert held / trials >= CONFIDENCE - 0.015


def test_too_few_rounds_say_nothing():
    assert median_interval([2.0] * (FEWEST_ROUNDS - 1)) == (0.0, math.inf)
    assert median_interval([2.0] * FEWEST_ROUNDS) == (2.0, 2.0)
    assert not steady([2.0] * (FEWEST_ROUNDS - 1))


def rounds(ratio, *, jitter, count):
    """Return rounds of two models, in which all seconds vary alike and the ratio by ``jitter``."""
    source = random.Random(0)
    slow = [source.uniform(1, 3) for _ in range(count)]
    other = [s / (ratio * (1 + jitter * source.uniform(-1, 1))) for s in slow]
    return {"a": [(s, s) for s in slow], "b": [(s, s) for s in other]}


def test_rounds_end_when_the_ratio_is_steady_although_the_machine_is_not():
    assert finished(rounds(1.2, jitter=0.001, count=FEWEST_ROUNDS), 1.0, **LIMITS)
    assert not finished(rounds(1.2, jitter=0.001, count=FEWEST_ROUNDS - 1), 1.0, **LIMITS)
    assert not finished(rounds(1.2, jitter=0.5, count=FEWEST_ROUNDS), 1.0, **LIMITS)


def test_rounds_that_stay_noisy_end_at_a_limit():
    noisy = rounds(1.2, jitter=0.5, count=30)
    assert finished(noisy, 1.0, **LIMITS)
    fewer = {name: each[:10] for name, each in noisy.items()}
    assert finished(fewer, 60.0, **LIMITS)
    assert not finished(fewer, 59.0, **LIMITS)
    first = {name: each[: FEWEST_ROUNDS - 1] for name, each in noisy.items()}
    assert not finished(first, 1e9, **LIMITS)


def test_a_model_alone_is_timed_until_its_own_seconds_are_steady():
    assert finished({"a": [(1.0, 2.0)] * FEWEST_ROUNDS}, 1.0, **LIMITS)
    varying = [(1.0, 2.0 + (i % 3)) for i in range(FEWEST_ROUNDS)]
    assert not finished({"a": varying}, 1.0, **LIMITS)


def test_the_largest_batch_fits_and_twice_as_many_do_not():
    form = dense_model_form(SHAPE)
    models = [(SHAPE, form)] * 2

    def needed(batch):
        load = generation_load(SHAPE, form, batch=batch, tokens=160)
        return 2 * whole_bytes(SHAPE, load)

    for batch in (1, 8, 64):
        for room in (needed(batch), needed(2 * batch) - 1):
            assert largest_batch(models, tokens=160, worker_bytes=room, most=1024) == batch
    assert largest_batch(models, tokens=160, worker_bytes=needed(1) - 1, most=1024) == 0
    assert largest_batch(models, tokens=160, worker_bytes=needed(64), most=20) == 16
