"""Which engine takes which result, from its config alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import methods
from planners.model.scheme import WHOLE_ROW, Scheme, arguments_of
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


def with_scheme(config, bits, group, *, symmetric=True, intermediate=11008):
    scheme = Scheme(bits=bits, group=group, symmetric=symmetric)
    groups = {"group_0": {"weights": arguments_of(scheme), "targets": ["down_proj"]}}
    return {**config, "intermediate_size": intermediate,
            "quantization_config": {"config_groups": groups}}  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "group", "more"),
    [
        (4, 128, {}),
        (4, 128, {"symmetric": False}),
        (3, WHOLE_ROW, {}),
        (8, 32, {}),
    ],
)
def test_integers_that_a_type_of_llama_cpp_holds_have_a_converter(bits, group, more):
    answers = {each.engine: each for each in served(with_scheme(STOCK, bits, group, **more))}
    assert "examples/quantised_to_gguf.py" in answers["llama.cpp"].command


@pytest.mark.parametrize(
    ("bits", "group", "more", "name"),
    [
        (4, 16, {}, "4/16"),
        (8, 128, {"symmetric": False}, "8/128z"),
        (4, WHOLE_ROW, {"intermediate": 688}, "4/row"),  # no multiple of 32
    ],
)
def test_integers_that_no_type_of_llama_cpp_holds_are_for_its_own_quantiser(
    bits, group, more, name
):
    _, others = engines(with_scheme(STOCK, bits, group, **more))
    assert f"none of its types holds {name} exactly" in others["llama.cpp"]
    assert "its own quantiser" in others["llama.cpp"]


@pytest.mark.parametrize(
    ("width", "group", "exported"), [(512, 32, True), (512, 16, False), (320, 32, False)]
)
def test_integers_in_ffn_widths_by_layer_are_exported_where_nothing_need_be_padded(
    width, group, exported
):
    layer = {**LAYER, "intermediate": width, "norm_weights": True, "ranks": {}}
    result = {**remote(), "layer_forms": [layer], "compressed_from": "llama"}
    _, others = engines(with_scheme(result, 4, group))
    assert ("--format deci" in others["llama.cpp"]) == exported


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


def quantised(config, **names):
    """Return a config whose matrices have schemes: name of a linear of layer 0 -> (bits, group)."""
    groups = {}
    for number, (name, (bits, group)) in enumerate(names.items()):
        module = name if name == "embed_tokens" else f"model.layers.0.part.{name}"
        groups[f"group_{number}"] = {
            "targets": [module],
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group",
                        "group_size": group},
        }  # fmt: skip
    return {**config, "intermediate_size": 11008, "quantization_config": {"config_groups": groups}}


@pytest.mark.parametrize(
    ("config", "engine", "words"),
    [
        (quantised(STOCK, down_proj=(4, 128)), "transformers", "pip install compressed-tensors"),
        (quantised(STOCK, down_proj=(3, 128)), "vLLM", "3/128 only by its Humming kernels"),
        (quantised(STOCK, down_proj=(4, 256)), "vLLM", "4/256 only by its Humming kernels"),
        (quantised(STOCK, down_proj=(4, 32)) | {"intermediate_size": 7393}, "vLLM", "7393 is pad"),
        (quantised(STOCK, q_proj=(4, 128), k_proj=(3, 128), v_proj=(4, 128)), "vLLM",
         "fuses q_proj, k_proj, v_proj of model.layers.0.part, which have several schemes"),
        (quantised(STOCK, gate_proj=(4, 128)), "SGLang", "fuses gate_proj, up_proj"),
        (quantised(STOCK, down_proj=(3, 128)), "SGLang", "up to 128, and this has 3/128"),
        (quantised(STOCK, embed_tokens=(8, 128)), "vLLM", "a quantised embedding"),
        (quantised(remote(), down_proj=(4, 128)), "vLLM", "not tried with quantised"),
    ],
)  # fmt: skip
def test_what_an_engine_does_with_a_quantised_result_is_said(config, engine, words):
    answers = {each.engine: each for each in served(config)}
    assert words in answers[engine].note


def test_a_scheme_that_kernels_take_needs_no_word():
    answers = {each.engine: each for each in served(quantised(STOCK, down_proj=(4, 128)))}
    assert answers["vLLM"].command
    assert not answers["vLLM"].note


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4, "tensor_parallel": 2}, "the 352 inputs of down_proj over 2 GPUs"),
        ({"embedding": 8}, "does not read a quantised embedding"),
        ({"schemes": "4/32", "tie": "free"}, "must have one scheme"),
    ],
)
def test_what_no_kernel_of_vllm_takes_is_refused_before_the_run(options, words):
    shape = llama_shape(
        family="llama", model_type="llama", num_layers=1, hidden=128, intermediate=352,
        num_heads=8, num_kv_heads=4, head_dim=16, vocab_size=61, tied=False,
    )  # fmt: skip
    spec = methods.spec("gptq")
    own = {option.name: option.default for option in spec.options if option.default != ""}
    own |= {"group": 32, "servable": "vllm"}
    assert not spec.refuses(shape, own)
    assert words in spec.refuses(shape, {**own, **options})
    assert not spec.refuses(shape, {**own, **options, "servable": "transformers"})
