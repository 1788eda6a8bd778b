"""How many sequences a model writes at one time, and over how many workers."""

import pytest

from planners.errors import PlanError
from planners.memory.self_text import part_sequences, writing_load, writing_stages
from planners.model.cost import dense_model_form
from tests.shapes import llama_shape

SEVEN_BILLION = {
    "num_layers": 32, "hidden": 4096, "intermediate": 11008, "num_heads": 32, "head_dim": 128,
    "vocab_size": 32000,
}  # fmt: skip
TINY = {
    "num_layers": 2, "hidden": 64, "intermediate": 128, "num_heads": 4, "head_dim": 16,
    "vocab_size": 100,
}  # fmt: skip


def shape_of(sizes, kv_heads):
    return llama_shape(
        family="llama", model_type="llama", dtype="bfloat16", tied=False, num_kv_heads=kv_heads,
        **sizes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "kv_heads", "microbatch", "expected"),
    [
        (TINY, 4, 2, 32),  # keys and values of any number are small
        (SEVEN_BILLION, 8, 2, 32),
        (SEVEN_BILLION, 32, 2, 12),  # a gibibyte each: as much as the weights
        (SEVEN_BILLION, 32, 16, 16),
    ],
)
def test_sequences_are_written_together_while_keys_and_values_are_no_more_than_the_weights(
    sizes, kv_heads, microbatch, expected
):
    shape = shape_of(sizes, kv_heads)
    found = part_sequences(
        shape, dense_model_form(shape), length=2048, microbatch=microbatch, dtype="bfloat16"
    )
    assert found == expected


def test_the_model_is_written_with_by_the_fewest_workers_that_hold_it():
    shape = shape_of(SEVEN_BILLION, 8)
    load = writing_load(
        shape, dense_model_form(shape), batch=32, prompt=16, length=2048, dtype="bfloat16"
    )
    stages = {
        gib: len(writing_stages(shape, load, num_workers=4, worker_bytes=gib * 2**30))
        for gib in (80, 20, 10)
    }
    assert stages == {80: 1, 20: 2, 10: 3}
    with pytest.raises(PlanError, match=r"recover\.data: self needs the whole model") as caught:
        writing_stages(shape, load, num_workers=4, worker_bytes=5 * 2**30)
    assert "--recover-data SRC" in caught.value.hint
