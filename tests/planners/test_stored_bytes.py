"""Bytes of the tensors of a model by kind: their sum is what its files hold."""

from dataclasses import replace

import pytest

from planners.model.cost import dense_model_form, matrices, model_bytes
from planners.model.scheme import Scheme
from planners.model.stored_bytes import bits_a_weight, bytes_by_kind, unquantised
from tests.shapes import llama_shape

SIZES = {
    "family": "llama", "model_type": "llama", "num_layers": 2, "hidden": 64, "intermediate": 96,
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 61,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_kinds_add_up_to_the_model_whatever_is_quantised(tied):
    shape = llama_shape(**SIZES, tied=tied)
    form = dense_model_form(shape)
    scheme = Scheme(bits=4, group=32)
    first = replace(form.layers[0], schemes=dict.fromkeys(matrices(shape, form.layers[0]), scheme))
    mixed = replace(form, layers=(first, form.layers[1]), dtype="bfloat16")
    for each in (form, mixed):
        found = bytes_by_kind(shape, each)
        assert sum(found.values()) == model_bytes(shape, each)
        assert (found["head"] == 0) == tied
        assert min(found.values()) >= 0
    assert unquantised(shape, mixed) == [
        "embedding", *([] if tied else ["head"]), "attention", "MLP", "norms and the rest"
    ]  # fmt: skip


def test_bits_of_a_weight_include_scales():
    shape = llama_shape(**SIZES, tied=False)
    form = dense_model_form(shape)
    scheme = Scheme(bits=4, group=32)
    layers = tuple(
        replace(layer, schemes=dict.fromkeys(matrices(shape, layer), scheme))
        for layer in form.layers
    )
    assert bits_a_weight(shape, replace(form, layers=layers)) == 4.5
    assert bits_a_weight(shape, replace(form, dtype="bfloat16")) == 16
