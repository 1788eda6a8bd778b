"""Counts of parameters, against models that are really built."""

import math
from dataclasses import asdict, replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from actors.modeling.travelling import classes
from actors.statistics.observe import LayerStatistics
from planners import families
from planners.model.cost import (
    dense_model_form,
    dense_parameters,
    forward_flops,
    layer_parameters,
    model_parameters,
    statistic_elements,
)
from planners.model.form import dense_form
from planners.model.layer import ROLES
from planners.model.taps import Statistic
from tests.shapes import dense_dims, has_bias, llama_shape
from tests.strategies import model_forms, shapes

TAPS = ("resid_attn", "resid_mlp", "resid_out", "attn_in", "o_in", "mlp_in", "mlp_hidden", "v")
STATISTICS = (
    *(Statistic(tap, kind) for tap in TAPS for kind in ("gram", "normed_gram")),
    Statistic("v", "head_gram"),
    Statistic("q_rope", "pair_energy"),
    Statistic("k_rope", "pair_energy"),
    Statistic("resid_out", "cosine"),
)


def config_of(shape):
    """Return the keys of ``config.json`` that a shape stands for."""
    return {
        "model_type": shape.model_type,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "pad_token_id": None,
    }


def num_parameters(model):
    """Return the distinct elements of a model: ``parameters`` yields a tied tensor once."""
    return sum(parameter.numel() for parameter in model.parameters())


@given(shapes())
def test_the_dense_count_is_that_of_the_transformers_model(shape):
    biases = {
        "attention_bias": has_bias(shape, "o_proj"),
        "mlp_bias": has_bias(shape, "up_proj"),
    }
    config = config_of(shape) | (biases if shape.model_type == "llama" else {})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert families.family_of(shape.model_type).shape_of(config, shape.dtype) == shape
    assert dense_parameters(shape) == num_parameters(model)


@given(st.data())
def test_the_count_of_any_form_is_that_of_the_model_that_runs_it(data):
    shape = data.draw(shapes())
    form = data.draw(model_forms(shape))
    code = classes(shape.model_type)
    config = code.CompressedConfig(
        **{
            **config_of(shape),
            "layout": families.load(shape.family).layout(shape),
            "tie_word_embeddings": form.tied,
            "embedding_dim": form.embedding_dim,
            "head_input_dim": form.head_dim,
            "head_norm_weight": form.head_norm_weight,
            "layer_forms": [asdict(layer) for layer in form.layers],
        }
    )
    with torch.device("meta"):
        model = code.CompressedForCausalLM(config)
    assert model_parameters(shape, form) == num_parameters(model)


@given(shapes())
def test_what_nothing_touched_counts_as_the_dense_model(shape):
    assert model_parameters(shape, dense_model_form(shape)) == dense_parameters(shape)


@given(shapes(), st.sampled_from(STATISTICS))
def test_a_statistic_takes_as_many_numbers_as_are_planned(shape, statistic):
    held = LayerStatistics([statistic], shape, families.load("llama"), device="cpu")
    assert statistic_elements(shape, statistic) == sum(s.numel() for s in held.sums.values())


@given(shapes(), st.sampled_from(STATISTICS), st.integers(1, 8), st.integers(1, 8))
def test_a_statistic_of_a_layer_that_is_cut_takes_as_many_numbers_as_are_planned(
    shape, statistic, width, pairs
):
    form = replace(
        dense_form(shape), residual_in=width, residual_mid=width + 1, residual_out=width + 2,
        intermediate=3 * width, qk_head_dim=2 * pairs, vo_head_dim=pairs,
    )  # fmt: skip
    held = LayerStatistics([statistic], shape, families.load("llama"), device="cpu", form=form)
    planned = statistic_elements(shape, statistic, form)
    assert planned == sum(s.numel() for s in held.sums.values())


def test_a_layer_of_two_factors_and_shortcuts_multiplies_what_it_stores():
    shape = llama_shape(
        family="llama", model_type="llama", num_layers=2, hidden=16, intermediate=24, num_heads=4,
        num_kv_heads=2, head_dim=4, vocab_size=50, tied=False,
    )  # fmt: skip
    layer = replace(dense_form(shape), ranks={"q_proj": 3}, shortcuts=True, norm_weights=False)
    form = replace(dense_model_form(shape), layers=(layer, layer))
    stored = sum(layer_parameters(shape, each) for each in form.layers)
    assert forward_flops(shape, tokens=1, sequence_length=1, form=form) == 2 * stored


def test_the_forward_pass_of_one_token_multiplies_every_weight_of_the_layers_once():
    shape = llama_shape(
        family="llama", model_type="llama", num_layers=3, hidden=16, intermediate=24, num_heads=4,
        num_kv_heads=2, head_dim=4, vocab_size=50, tied=False,
    )  # fmt: skip
    weights = sum(math.prod(dense_dims(shape, role)) for role in ROLES)
    assert forward_flops(shape, tokens=1, sequence_length=1) == 2 * 3 * weights
    # Attention is causal: a token looks at half of a sequence, for scores and again for values.
    scores = 2 * 2 * (4 * 4) * (100 // 2)
    assert forward_flops(shape, tokens=1, sequence_length=100) == 3 * (2 * weights + scores)
