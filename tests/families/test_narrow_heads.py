"""Narrower heads in a stock model: the same numbers as our own code for the same cut."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from actors import methods
from actors.modeling.halves import HalvedLayer
from actors.modeling.travelling import classes
from actors.statistics.observe import summary
from orchestrator.prepare.model_config import result_config
from orchestrator.recipe.method_options import resolve_options
from planners.budget.served import narrows_heads, pair_order, with_heads
from planners.budget.widths import cut_layer, layer_widths
from planners.model.cost import dense_model_form
from tests.families.test_methods import Dense
from tests.families.tiny import MODEL_TYPES, config_of, ids_of, logits_of, shape_of

WIDTH = 4  # of 8
SPEC = methods.spec("modegpt")
OPTIONS = resolve_options(SPEC, {"servable": "narrow_heads"})
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
NARROWED = [t for t in MODEL_TYPES if narrows_heads(shape_of(config_of(t))[1])]
CASES = [(t, "default") for t in NARROWED] + [
    ("llama", rope) for rope in ROPES if rope != "default"
]


def rope(name):
    return {"rope_parameters": {"rope_theta": 10000.0, **ROPES[name]}} if ROPES[name] else {}


def narrowed(dense):
    """Return the tensors and form of a model with narrower heads and FFN."""
    shape, family = dense.shape, dense.family
    sums = dense.observed(SPEC.statistics(shape, OPTIONS))
    order = pair_order([summary(each, ()) for each in sums])
    start = dense_model_form(shape)
    layers = [
        cut_layer(narrow, layer_widths(narrow) | {"mlp": 16})
        for narrow in (
            with_heads(layer, WIDTH, pairs=order[: WIDTH // 2]) for layer in start.layers
        )
    ]
    state = {
        name: tensor for name, tensor in dense.state.items() if not name.startswith("model.layers")
    }
    for index, layer in enumerate(layers):
        new, _ = methods.load("modegpt").compress(
            dense.layer(index), sums[index], shape=shape, form=layer, options=OPTIONS
        )
        prefix = family.layer.format(i=index) + "."
        state |= {prefix + family.below_layer(role): tensor for role, tensor in new.items()}
    return state, replace(start, layers=tuple(layers), native=True)


@pytest.mark.parametrize(("model_type", "scaling"), CASES)
def test_a_stock_model_of_narrower_heads_is_our_own_cut_model(model_type, scaling):
    dense = Dense(model_type, **rope(scaling))
    state, form = narrowed(dense)
    config = result_config(dense.config.to_dict(), dense.shape, form)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).double().eval()
    stock.load_state_dict(state, strict=True)
    assert stock.config.head_dim == WIDTH
    assert "layer_forms" not in config

    ours = dict(state)
    family, shape = dense.family, dense.shape
    for index, layer in enumerate(form.layers):
        prefix = family.layer.format(i=index) + "."
        for part in ("weight", "bias"):
            name = prefix + family.below_layer(f"q_proj.{part}")
            if name in ours:
                ours[name] = ours[name] / math.sqrt(WIDTH / shape.head_dim)
        if shape.kind(layer).rotary:
            pairs = torch.tensor(layer.pairs).repeat(shape.num_kv_heads, 1)
            ours[prefix + family.below_layer("rope_pairs")] = pairs
    own_pairs = tuple(replace(layer, pairs=()) for layer in form.layers)
    remote = result_config(
        dense.config.to_dict(), shape, replace(form, layers=own_pairs, native=False)
    )
    code = classes(model_type)
    kept = {key: value for key, value in remote.items() if key not in ("model_type", "dtype")}
    own = code.CompressedForCausalLM(code.CompressedConfig(**kept)).double().eval()
    own.load_state_dict(ours, strict=True)
    logits = logits_of(own, ids_of())
    # Frequencies and factors are float32 in transformers.
    assert float((logits_of(stock, ids_of()) - logits).abs().max() / logits.abs().max()) < 1e-5
    dense_logits = logits_of(dense.model, ids_of())
    assert float((logits - dense_logits).abs().max() / dense_logits.abs().max()) > 1e-4


def halved(dense, probe):
    """Return the first layer of a model in halves."""
    tensors = {dense.family.below_layer(role): each for role, each in dense.layer(0).items()}
    return HalvedLayer(
        tensors, dense_model_form(dense.shape).layers[0], dense.config.to_dict(), index=0,
        shape=dense.shape, dtype=probe.dtype, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@torch.no_grad()
def test_what_q_is_multiplied_by_is_least_squares_of_the_scores(model_type):
    dense, pairs = Dense(model_type), (0, 2)
    probe = torch.randn(2, 12, dense.shape.hidden, dtype=torch.float64)
    layer = dense.model.model.layers[0]
    positions = dense.model.model.rotary_emb(probe, torch.arange(12)[None])
    x = layer.input_layernorm(probe)
    q, k = (
        linear(x).view(2, 12, -1, dense.shape.head_dim).transpose(1, 2)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *positions)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    half = dense.shape.head_dim // 2
    kept = [*pairs, *(pair + half for pair in pairs)]
    expected = []
    for head in range(q.shape[1]):
        rows, targets = [], []
        for token in range(12):  # each by its share of the tokens that it sees
            for sequence in range(2):
                query, keys = q[sequence, head, token], k[sequence, head, : token + 1]
                whole, some = keys @ query, keys[:, kept] @ query[kept]
                rows += ((some - some.mean()) / (token + 1) ** 0.5).tolist()
                targets += ((whole - whole.mean()) / (token + 1) ** 0.5).tolist()
        expected.append(float(np.linalg.lstsq(np.array(rows)[:, None], np.array(targets))[0][0]))
    found = halved(dense, probe).score_scales(probe, pairs)
    np.testing.assert_allclose(found.tolist(), expected, rtol=1e-4)
    all_pairs = halved(dense, probe).score_scales(probe, range(half))
    np.testing.assert_allclose(all_pairs.tolist(), 1.0, rtol=1e-5)


def test_frequencies_that_depend_on_the_length_of_a_text_are_not_narrowed():
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    for scaling in ({"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", **lists}):
        config = config_of("llama", rope_parameters={"rope_theta": 1e4, **scaling})
        _, shape = shape_of(config)
        assert not narrows_heads(shape)
        assert "no config of model type llama" in SPEC.refuses(shape, OPTIONS)
