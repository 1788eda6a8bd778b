"""A ``config.json`` of a stranger: refused by the key, and nothing it asks for is executed."""

import json
import math

import pytest

from planners.errors import ModelError
from tests.bad_input.conftest import ABSENT
from tests.bad_input.refusals import attempt

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

WRONG = {
    "hidden_size missing": ({"hidden_size": ABSENT}, "hidden_size is missing"),
    "hidden_size null": ({"hidden_size": None}, "hidden_size is missing"),
    "hidden_size zero": ({"hidden_size": 0}, "hidden_size is 0; it must be an integer from 1"),
    "hidden_size negative": ({"hidden_size": -32}, "hidden_size is -32"),
    "hidden_size fractional": ({"hidden_size": 32.0}, "hidden_size is 32.0"),
    "hidden_size text": ({"hidden_size": "32"}, "hidden_size is '32'"),
    "hidden_size boolean": ({"hidden_size": True}, "hidden_size is True"),
    "hidden_size a list": ({"hidden_size": [32]}, "hidden_size is [32]"),
    "hidden_size huge": ({"hidden_size": 2**62}, "it must be an integer from 1 to 16777216"),
    "hidden_size of 4,000 digits": ({"hidden_size": 10**4000}, "hidden_size is 1000"),
    "hidden_size of no weights": ({"hidden_size": 2**24}, "config.json requires [512, 16777216]"),
    "layers none": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "layers a million": ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000 is over 4096"),
    "layers too many": ({"num_hidden_layers": 4}, "tensor model.layers.3.self_attn.q_proj"),
    "layers too few": (
        {"num_hidden_layers": 2},
        "'model.layers.2.input_layernorm.weight' does not belong",
    ),
    "heads none": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "heads not a multiple": (
        {"num_attention_heads": 5, "num_key_value_heads": 2, "head_dim": 8},
        "num_attention_heads 5 is not a multiple of num_key_value_heads 2",
    ),
    "more kv heads than heads": ({"num_key_value_heads": 8}, "4 is not a multiple of num_key"),
    "head_dim odd": ({"head_dim": 7}, "head_dim 7 is odd; rotary embedding needs pairs"),
    "head_dim of no weights": ({"head_dim": 16}, "q_proj.weight has shape [32, 32]; config.json"),
    "intermediate missing": ({"intermediate_size": ABSENT}, "intermediate_size is missing"),
    "intermediate wrong": ({"intermediate_size": 57}, "gate_proj.weight has shape [56, 32]"),
    "vocab missing": ({"vocab_size": ABSENT}, "vocab_size is missing"),
    "vocab wrong": ({"vocab_size": 511}, "embed_tokens.weight has shape [512, 32]"),
    "model_type missing": ({"model_type": ABSENT}, "model_type is missing"),
    "model_type a number": ({"model_type": 3}, "model_type is 3; it must be one of: cohere"),
    "model_type a list": ({"model_type": ["llama"]}, "model_type is ['llama']; it must be one"),
    "model_type empty": ({"model_type": ""}, "model_type is ''; it must be one of: cohere"),
    "model_type nearly known": ({"model_type": "mixtral"}, "starcoder2; no file in planners"),
    "model_type unknown": (
        {"model_type": "bert"},
        "model_type 'bert' is not supported; supported: cohere",
    ),
    "model_type of a path": ({"model_type": "../llama"}, "'../llama' is not supported"),
    "biases that are not there": ({"attention_bias": True}, "q_proj.bias is missing"),
    "bias a text": ({"attention_bias": "false"}, "attention_bias is 'false'; it must be true or"),
    "mlp_bias a number": ({"mlp_bias": 0}, "mlp_bias is 0; it must be true or false"),
    "tied a text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "tied but for the values": (
        {"tie_word_embeddings": True},
        "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "has quantization_config: quantised weights cannot be compressed",
    ),
    "weights of another file": ({"transformers_weights": "evil.bin"}, "has transformers_weights"),
    "attention code of a repository": (
        {"attn_implementation": "nobody/kernel"},
        "attn_implementation is 'nobody/kernel'; it must be one of: sdpa, eager",
    ),
    "attention code of a package": ({"_attn_implementation": "flash_attention_2"}, "sdpa, eager"),
    "layers that differ": ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
    "eps text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a small number"),
    "eps null": ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    "eps zero": ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    "eps negative": ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
    "eps NaN": ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    "eps infinite": ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
    "activation unknown": ({"hidden_act": "os.system"}, "hidden_act is 'os.system'; it must be"),
    "activation a list": ({"hidden_act": ["silu"]}, "hidden_act is ['silu']"),
    "activation null": ({"hidden_act": None}, "hidden_act"),
    "positions zero": ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    "positions null": ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    "positions text": ({"max_position_embeddings": "40"}, "max_position_embeddings is '40'"),
    "positions infinite": ({"max_position_embeddings": math.inf}, "max_position_embeddings is inf"),
    "window negative": ({"sliding_window": -1}, "sliding_window is -1"),
    "window text": ({"sliding_window": "all"}, "sliding_window is 'all'"),
    "tokens that see the later ones": ({"is_causal": False}, "is_causal is false"),
    "a mistral that is a ministral": (
        {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
        "has layer_types: transformers then reads a mistral as a ministral",
    ),
    "window of no layer": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
        "layer_types has sliding_attention, but there is no window: set use_sliding_window",
    ),
    "layer types of other layers": (
        {"model_type": "qwen2", "layer_types": ["full_attention"] * 2},
        "layer_types has 2 entries for 3 layers",
    ),
    "layer types unknown": (
        {"model_type": "qwen2", "layer_types": ["linear_attention"] * 3},
        "it must be a list of full_attention and sliding_attention",
    ),
    "layer types a text": ({"model_type": "qwen2", "layer_types": "full"}, "must be a list of"),
    "window layers a text": ({"model_type": "qwen2", "max_window_layers": "2"}, "is '2'; it must"),
    "window used, a text": ({"model_type": "qwen2", "use_sliding_window": "no"}, "true or false"),
    "dtype unknown": ({"dtype": "int3"}, "dtype is 'int3'; it must be one of: float32, bfloat16"),
    "dtype a module's name": ({"torch_dtype": "nn"}, "torch_dtype is 'nn'"),
    "rope a list": ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object"),
    "rope a text": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
    "rope of unknown type": (
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        "rope_type 'spiral' is not supported; supported: default, linear, dynamic, yarn, llama3",
    ),
    "rope of a type with parts": (
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "rope_type 'proportional' is not supported",
    ),
    "rope type a number": ({"rope_parameters": {"rope_type": 3}}, "rope_type 3 is not supported"),
    "rope type a list": ({"rope_scaling": {"type": ["yarn"]}}, "rope_type ['yarn'] is not"),
    "rope type null": ({"rope_scaling": {"rope_type": None}}, "rope_type missing is not supported"),
    "theta text": ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'; it must be a"),
    "theta zero": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    "theta NaN": ({"rope_parameters": {"rope_theta": math.nan}}, "rope_theta is nan"),
    "theta of 4,000 digits": ({"rope_parameters": {"rope_theta": 10**4000}}, "rope_theta is 1000"),
    "theta null, as of old": (
        {"rope_parameters": ABSENT, "rope_theta": None},
        "rope_theta is missing",
    ),
    "linear without factor": (
        {"rope_scaling": {"type": "linear"}},
        "rope_scaling: factor is missing; it must be a number above 0",
    ),
    "linear factor zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    "linear factor a flag": ({"rope_scaling": {"type": "linear", "factor": True}}, "is True"),
    "dynamic factor text": ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor is '2'"),
    "yarn without factor": ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
    "yarn beta text": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}},
        "config.json: transformers cannot build this model",
    ),
    "llama3 without factors": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor is missing",
    ),
    "llama3 factors reversed": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "high_freq_factor is not above low_freq_factor",
    ),
    "llama3 original length text": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                **LLAMA3,
                "original_max_position_embeddings": "8192",
            }
        },
        "transformers cannot build this model",
    ),
    "longrope of another head": (
        {"rope_scaling": {"rope_type": "longrope", **LONG, "long_factor": [1.0] * 3}},
        "long_factor is [1.0, 1.0, 1.0]; it must be a list of 4 numbers above 0",
    ),
    "longrope without lists": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "short_factor is missing; it must be a list of 4 numbers",
    ),
    "rotary part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
    "rotary part in rope": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is not supported",
    ),
    "dropout text": ({"attention_dropout": "none"}, "transformers cannot build this model"),
    "initializer text": ({"initializer_range": "small"}, "'initializer_range'"),
    "padding beyond the vocabulary": ({"pad_token_id": 10**6}, "transformers cannot build"),
    "padding a text": ({"pad_token_id": "<pad>"}, "'pad_token_id'"),
    "labels a number": ({"id2label": 3}, "transformers cannot build this model"),
    "a name that is a method": ({"validate": 1, "to_dict": 2}, "transformers cannot build"),
    "compressed already": (
        {"model_type": "compress_cluster", "compressed_from": "llama", "layer_forms": []},
        "is already a compressed model; compress the original model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_refused_by_name(refused, edit, case):
    changes, words = WRONG[case]
    edit("config.json", **changes)
    refused(ModelError, "config.json" if "config" in words else "", words)


BROKEN = {
    "empty": (b"", "not valid JSON"),
    "not JSON": (b"{model_type: llama}", "not valid JSON"),
    "not text": (b"\x80\x04\x95", "not valid JSON"),
    "list": (b"[]", "not a JSON object"),
    "text": (b'"llama"', "not a JSON object"),
    "nothing in it": (b"{}", "model_type is missing"),
    "nested": (b'{"a":' * 100_000, "not valid JSON"),
    "number of 5,000 digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_is_refused(refused, model, case):
    data, words = BROKEN[case]
    (model / "config.json").write_bytes(data)
    refused(ModelError, str(model / "config.json"), words)


def test_a_missing_config_is_refused(refused, model):
    (model / "config.json").unlink()
    refused(ModelError, str(model), "has no config.json")


FINE = {
    "no end or beginning": {"eos_token_id": ABSENT, "bos_token_id": ABSENT},
    "keys that nobody knows": {"my_key": {"a": [1]}, "_name_or_path": "/home/somebody"},
    "no eps": {"rms_norm_eps": ABSENT},
    "no activation": {"hidden_act": ABSENT},
    "old rope": {"rope_parameters": ABSENT, "rope_theta": 500000.0, "rope_scaling": None},
    "old linear rope": {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "factor": 2}},
    "llama3 rope": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "longrope": {"rope_scaling": {"rope_type": "longrope", **LONG, "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "no rope at all": {"rope_parameters": ABSENT},
    "no kv heads named": {"num_key_value_heads": 2, "head_dim": None},
    "old dtype": {"dtype": ABSENT, "torch_dtype": "float32"},
}


@pytest.mark.filterwarnings("default")  # transformers may warn of what it takes
@pytest.mark.parametrize("case", FINE)
def test_what_a_model_can_do_without_is_no_error(model, edit, tmp_path, case):
    edit("config.json", **FINE[case])
    assert attempt(model, tmp_path / "run").plan.keep_fraction < 1


def test_code_that_comes_with_a_model_is_not_run(model, edit, tmp_path, canary):
    code = f"open({str(canary)!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    edit(
        "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.Config",
            "AutoModel": "modeling_evil.Model",
            "AutoModelForCausalLM": "modeling_evil.Model",
        },
        architectures=["EvilForCausalLM"],
    )
    assert attempt(model, tmp_path / "run").plan.keep_fraction < 1


def test_code_under_the_name_of_ours_is_refused_and_not_run(refused, model, edit, canary):
    (model / "modeling_compressed.py").write_text(f"open({str(canary)!r}, 'w')\n")
    edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_compressed.Model"})
    refused(ModelError, "modeling_compressed.py: code that comes with a model is never run")


GENERATION = {
    "not JSON": (b"{", "not valid JSON"),
    "a list": (b"[1]", "not a JSON object"),
    "an id in words": (b'{"eos_token_id": "</s>"}', "eos_token_id is '</s>'; it must be a whole"),
    "ids in words": (b'{"eos_token_id": [1, "2"]}', "eos_token_id is [1, '2']; it must be"),
    "an id that is true": (b'{"pad_token_id": true}', "pad_token_id is True; it must be"),
}


@pytest.mark.parametrize("case", GENERATION)
def test_a_broken_generation_config_is_refused(refused, model, case):
    data, words = GENERATION[case]
    (model / "generation_config.json").write_bytes(data)
    refused(ModelError, str(model / "generation_config.json"), words)


def test_the_message_of_a_long_value_is_short(refused, edit):
    edit("config.json", hidden_size="x" * 1_000_000)
    assert len(refused(ModelError, "hidden_size is 'xxx")) < 400


def test_the_words_of_transformers_come_in_one_line(refused, edit):
    edit("config.json", attention_dropout={"a": "\n" * 1000})
    refused(ModelError, "transformers cannot build this model")


def test_json_of_the_sound_model_is_what_the_cases_assume(sound):
    config = json.loads((sound / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (32, 3, 8)
