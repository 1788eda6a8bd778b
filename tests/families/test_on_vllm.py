"""What vLLM's Transformers backend asks of a model that brings its own code.

Each test is one thing that it does when it loads a model: `_try_resolve_transformers` in
``vllm/model_executor/models/registry.py``, and `Base.__init__`, `recursive_replace`,
`create_attention_instances` and `load_weights` in
``vllm/model_executor/models/transformers/base.py``. The result has FFN widths by layer, and whole
heads of a width that its kernels have.
"""

import contextlib
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planners.serving import VLLM_HEAD_DIMS, served
from tests.builders import compress_local, save_model

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
IDS = torch.arange(3, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A result with FFN widths by layer."""
    base = tmp_path_factory.mktemp("vllm")
    model = save_model(base / "dense", hidden_size=HEADS * HEAD_DIM, intermediate_size=96,
                       num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)  # fmt: skip
    compress_local(model, base / "run", method="modegpt", keep_fraction=0.8,
                   options={"servable": "vllm"})  # fmt: skip
    return base / "run/model"


def config_of(folder, attention="sdpa"):
    """Return the config as the backend patches it (`_patch_config`)."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = attention
    return config


@contextlib.contextmanager
def parameters_on_meta(monkeypatch):
    """Put parameters, and no buffer, on the meta device (`init_on_device_without_buffers`)."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_parameter", on_meta)
        yield


class Attention:
    """What the backend keeps a layer's keys and values in: here it attends at once."""

    def __init__(self, scale):
        self.scale = scale

    def forward(self, query, key, value):
        """Return the output (tokens, heads * dim) of flat q, k and v, as an engine gives it."""
        query, key, value = (x.view(len(x), -1, HEAD_DIM).transpose(0, 1)[None]
                             for x in (query, key, value))  # fmt: skip
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return output[0].transpose(0, 1).reshape(output.shape[2], -1)


def attend(module, query, key, value, *_, scaling, attention_instances, **_kwargs):
    """Do what the function that the backend registers as "vllm" does."""
    own = attention_instances[module.layer_idx]
    own.scale = scaling
    flat = [x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value)]
    return own.forward(*flat), None


def test_the_class_is_found_and_says_that_it_takes_another_attention(folder):
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert not hasattr(transformers, architecture)  # so auto_map is looked into
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        found = get_class_from_dynamic_module(config["auto_map"][name], folder)
        assert name == "AutoConfig" or found.is_backend_compatible()


def test_the_base_model_is_built_on_meta_with_buffers_that_have_values(folder, monkeypatch):
    with parameters_on_meta(monkeypatch):
        model = AutoModel.from_config(config_of(folder), trust_remote_code=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    with torch.device("meta"):  # `_get_decoder_cls`
        again = AutoModel.from_config(config_of(folder), trust_remote_code=True)
    assert type(again.get_decoder()) is type(model)
    assert model.get_input_embeddings().embedding_dim == model.config.hidden_size
    (layers,) = (m for m in model.children() if isinstance(m, nn.ModuleList))
    assert len(layers) == model.config.num_hidden_layers


def test_attention_has_one_head_width_that_the_kernels_take(folder):
    config = config_of(folder)
    assert config.head_dim in VLLM_HEAD_DIMS
    model = AutoModel.from_config(config, trust_remote_code=True)
    for index, layer in enumerate(model.layers):
        attention = layer.self_attn
        assert attention.layer_idx == index
        assert attention.is_causal
        assert attention.q_proj.out_features == config.num_attention_heads * config.head_dim
        for linear in (attention.k_proj, attention.v_proj):
            assert linear.out_features == config.num_key_value_heads * config.head_dim
    (answer,) = (each for each in served(json.loads((folder / "config.json").read_text()))
                 if each.engine == "vLLM")  # fmt: skip
    assert "--model-impl transformers" in answer.command


def test_attention_instances_reach_the_registered_function_of_every_layer(folder, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attend)
    config = config_of(folder, attention="vllm")
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    model.load_state_dict(stock.base_model.state_dict())
    instances = {i: Attention(HEAD_DIM**-0.5) for i in range(config.num_hidden_layers)}
    with torch.no_grad():
        (hidden, *_) = model(
            input_ids=IDS[None], position_ids=torch.arange(len(IDS))[None], use_cache=False,
            attention_instances=instances, return_dict=False,
        )  # fmt: skip
        expected = stock.base_model(IDS[None]).last_hidden_state
    assert torch.allclose(hidden, expected, atol=1e-5)


def test_the_plan_for_tensor_parallelism_names_every_linear_of_the_layers(folder):
    model = AutoModel.from_config(config_of(folder), trust_remote_code=True)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    widths = set()
    for name, linear in linears.items():
        (style,) = {style for pattern, style in model.tp_plan.items() if re.match(pattern, name)}
        assert style in ("colwise", "rowwise")
        sharded = linear.out_features if style == "colwise" else linear.in_features
        assert sharded % 2 == 0
        widths |= {sharded} if "mlp" in name else set()
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert len(widths) > 1


def test_every_stored_tensor_is_a_parameter(folder):
    # `AutoWeightsLoader` refuses a name that is none, such as a buffer of ours would be.
    model = AutoModel.from_config(config_of(folder), trust_remote_code=True)
    parameters = {f"model.{n}": tuple(p.shape) for n, p in model.named_parameters()}
    stored = {n: tuple(t.shape) for file in folder.glob("*.safetensors")
              for n, t in load_file(file).items()}  # fmt: skip
    assert {n: s for n, s in stored.items() if not n.startswith("lm_head.")} == parameters


def test_narrower_heads_have_no_plan_for_tensor_parallelism(tmp_path):
    model = save_model(tmp_path / "dense", num_hidden_layers=1)
    compress_local(model, tmp_path / "run", method="modegpt", keep_fraction=0.9,
                   options={"modules": "qk,vo", "allocation": "uniform"})  # fmt: skip
    config = config_of(tmp_path / "run/model")
    assert config.base_model_tp_plan is None
    assert AutoModel.from_config(config, trust_remote_code=True).tp_plan == {}
