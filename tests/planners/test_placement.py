"""Stages and waves: every layer once, in order, in the memory that there is."""

import re
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planners.batching import TokenBatching
from planners.errors import PlanError
from planners.memory.placement import Load, load_of, place
from planners.model.cost import layer_parameters, statistic_elements
from planners.model.form import dense_form
from planners.model.taps import Statistic
from tests.shapes import llama_shape

LOADS = st.builds(
    Load,
    layer=st.integers(1, 10**6),
    statistics=st.integers(0, 10**6),
    microbatch=st.integers(1, 10**4),
    workspace=st.integers(0, 10**6),
)


def shape_of(num_layers):
    return llama_shape(
        family="llama", model_type="llama", num_layers=num_layers, hidden=32, intermediate=48,
        num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=100, tied=False,
    )  # fmt: skip


def smallest_worker(load):
    return sum(load.stage(1).values())


@given(st.integers(1, 90), st.integers(1, 40), LOADS, st.integers(0, 5 * 10**6) | st.none())
def test_waves_cover_all_layers_once_in_order_within_memory(num_layers, workers, load, spare):
    memory = None if spare is None else smallest_worker(load) + spare
    waves = place(shape_of(num_layers), load, num_workers=workers, worker_bytes=memory)
    stages = list(chain.from_iterable(waves))
    edges = [(stage.first, stage.last) for stage in stages]
    assert edges[0][0] == 0
    assert edges[-1][1] == num_layers
    assert all(last == first for (_, last), (first, _) in pairwise(edges))
    assert all(first < last for first, last in edges)
    assert all(len(wave) <= workers for wave in waves)
    assert [stage.embedding for stage in stages] == [stage.first == 0 for stage in stages]
    assert [stage.head for stage in stages] == [stage.last == num_layers for stage in stages]
    for stage in stages:
        assert stage.bytes == load.stage(stage.last - stage.first)
        assert memory is None or sum(stage.bytes.values()) <= memory


@given(st.integers(1, 90), st.integers(1, 40), LOADS, st.integers(0, 5 * 10**6))
def test_there_are_no_more_waves_than_memory_asks_for(num_layers, workers, load, spare):
    memory = smallest_worker(load) + spare
    waves = place(shape_of(num_layers), load, num_workers=workers, worker_bytes=memory)
    most = max(n for n in range(1, num_layers + 1) if sum(load.stage(n).values()) <= memory)
    assert len(waves) == -(-num_layers // (min(workers, num_layers) * most))


@given(st.integers(1, 9), LOADS, st.data())
def test_a_worker_too_small_for_one_layer_is_told_by_how_many_bytes(num_layers, load, data):
    memory = data.draw(st.integers(1, smallest_worker(load) - 1))
    shape = shape_of(num_layers)
    with pytest.raises(PlanError) as caught:
        place(shape, load, num_workers=2, worker_bytes=memory)
    missing = int(re.search(r"([\d,]+) bytes too small", str(caught.value))[1].replace(",", ""))
    assert place(shape, load, num_workers=2, worker_bytes=memory + missing)
    with pytest.raises(PlanError, match=" 1 bytes too small"):
        place(shape, load, num_workers=2, worker_bytes=memory + missing - 1)


@given(st.sampled_from(("float32", "bfloat16")), st.integers(1, 4096))
def test_a_layer_takes_its_weights_and_its_sums(dtype, tokens):
    shape = shape_of(3)
    statistics = frozenset({Statistic("resid_attn", "gram"), Statistic("resid_mlp", "gram")})
    batching = TokenBatching(
        sequences=tokens, sequence_length=1, microbatch_sequences=tokens, dtype=dtype
    )
    load = load_of(shape, statistics, batching)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert load.layer == width * layer_parameters(shape, dense_form(shape))
    assert load.statistics == 8 * sum(statistic_elements(shape, s) for s in statistics)
    assert load.microbatch == tokens * 32 * width
