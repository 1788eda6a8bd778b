"""Which engine takes which result, from its config alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planners.serving import VLLM_HEAD_DIMS, deci_blocks, served
from tests.shapes import llama_shape

STOCK = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LAYER = {
    "residual_in": 4096, "residual_mid": 4096, "residual_out": 4096, "qk_head_dim": 128,
    "vo_head_dim": 128,
}  # fmt: skip
DECI = {**STOCK, "architectures": ["DeciLMForCausalLM"], "block_configs": [{}]}
ROPE = {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}


def remote(**cut):
    first = {**LAYER, **cut}
    return {**STOCK, "architectures": ["CompressedForCausalLM"], "layer_forms": [first, LAYER],
            "head_shortcut": False}  # fmt: skip


def engines(config):
    """Return the engines that take a result, and what is said of the others."""
    answers = served(config)
    taken = {each.engine for each in answers if each.command}
    return taken, {each.engine: each.note for each in answers if not each.command}


def test_every_engine_takes_a_stock_result():
    taken, others = engines(STOCK)
    assert taken == {"transformers", "vLLM", "SGLang", "llama.cpp"}
    assert not others
    assert all("trust" not in each.command for each in served(STOCK))


@pytest.mark.parametrize(
    ("config", "takes", "why"),
    [
        (remote(), {"transformers", "vLLM", "SGLang"}, {"llama.cpp": "no such layers"}),
        (remote(qk_head_dim=96), {"transformers"}, {"vLLM": "head width", "SGLang": "head width"}),
        (remote(residual_mid=3072), {"transformers"}, {"vLLM": "embedding has the width"}),
        (remote() | {"head_dim": 80} | {"layer_forms": [{**LAYER, "qk_head_dim": 80,
                                                         "vo_head_dim": 80}]},
         {"transformers", "SGLang"}, {"vLLM": "no head width 80"}),
        (STOCK | ROPE, {"transformers", "vLLM", "SGLang"}, {"llama.cpp": "factors of longrope"}),
        (STOCK | {"architectures": ["OPTForCausalLM"]}, {"transformers", "vLLM", "SGLang"},
         {"llama.cpp": "does not know OPTForCausalLM"}),
        (DECI, {"vLLM", "llama.cpp"}, {"transformers": "no class for this form"}),
        (DECI | {"head_dim": 64}, {"vLLM"}, {"llama.cpp": "hidden_size / num_attention_heads"}),
        (DECI | {"rope_parameters": {"rope_type": "linear"}}, {"vLLM"},
         {"llama.cpp": "drops linear rope"}),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_take_a_result_says_why(config, takes, why):
    taken, others = engines(config)
    assert taken == takes
    for engine, words in why.items():
        assert words in others[engine]


def test_a_stock_result_that_slow_kernels_serve_says_so():
    answers = {each.engine: each for each in served({**STOCK, "head_dim": 104})}
    assert 104 not in VLLM_HEAD_DIMS
    assert "no head width 104" in answers["vLLM"].note
    assert answers["vLLM"].command


@given(hidden=st.integers(1, 2**15), count=st.integers(1, 2**9))
def test_the_factor_of_a_layer_gives_its_width_in_the_arithmetic_of_the_engines(hidden, count):
    shape = llama_shape(
        family="llama", model_type="llama", num_layers=1, hidden=hidden, intermediate=1,
        num_heads=8, num_kv_heads=2, head_dim=2, vocab_size=1, tied=False,
    )  # fmt: skip
    (block,) = deci_blocks(shape, (256 * count,))
    width = int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
    width += -width % 256
    assert width == block["ffn"]["intermediate_size"] == 256 * count
    assert block["attention"]["n_heads_in_group"] == 4
