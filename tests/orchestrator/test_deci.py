"""A result in the deci form: the same tensors, the same logits, and what cannot be exported."""

import copy
import hashlib
import json
import pickle

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from orchestrator.cli.main import cli
from orchestrator.experiments.deci import write_deci
from planners.errors import ConfigError
from planners.serving import deci_widths
from tests.builders import compress_local, run_local, save_model

IDS = torch.arange(20)[None]


def engines_width(ffn_mult, hidden):
    """Return the width that both engines compute from the factor of a layer."""
    width = int(2 * ffn_mult * hidden / 3)
    return -(-width // 256) * 256


def stock_llama(folder):
    """Return transformers' Llama with the FFN widths that an engine reads, and these weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    facts = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    facts["attention_bias"] = config.attention_bias or hasattr(config, "qkv_bias")
    model = LlamaForCausalLM(LlamaConfig(**facts))
    for layer, block in zip(model.model.layers, config.block_configs, strict=True):
        width = engines_width(block.ffn.ffn_mult, config.hidden_size)
        assert width == block.ffn.intermediate_size
        assert block.attention.n_heads_in_group == 2
        assert not block.attention.no_op
        assert not block.ffn.no_op
        for name, dims in {"gate_proj": (config.hidden_size, width),
                           "up_proj": (config.hidden_size, width),
                           "down_proj": (width, config.hidden_size)}.items():  # fmt: skip
            setattr(layer.mlp, name, nn.Linear(*dims, bias=config.mlp_bias))
        if hasattr(config, "qkv_bias"):
            layer.self_attn.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
    weights = {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_hashes_hold(folder):
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_an_export_has_the_widths_the_tensors_and_the_logits_of_the_result(tmp_path):
    model = save_model(tmp_path / "dense", intermediate_size=600)
    run_local(model, tmp_path / "run", method="modegpt", keep_fraction=0.86,
              options={"modules": "mlp"})  # fmt: skip
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), "--format", "deci", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["widths"] == [-(-width // 256) * 256 for width in found["widths_before"]]
    assert len(set(found["widths"])) > 1
    more = sum(found["widths"]) - sum(found["widths_before"])
    assert found["parameters_added"] == more * 3 * 32
    folder = tmp_path / "run/deci"
    assert_hashes_hold(folder)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", trust_remote_code=True)
    exported = stock_llama(folder)
    assert torch.allclose(logits(exported), logits(result), atol=1e-5)
    for layer, own in zip(exported.model.layers, result.model.layers, strict=True):
        kept = own.mlp.up_proj.out_features
        assert torch.equal(layer.mlp.up_proj.weight[:kept], own.mlp.up_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight[:, :kept], own.mlp.down_proj.weight)
        for added in (layer.mlp.up_proj.weight[kept:], layer.mlp.gate_proj.weight[kept:],
                      layer.mlp.down_proj.weight[:, kept:]):  # fmt: skip
            assert not added.any()


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
    ],
)
def test_a_model_of_each_kind_has_the_logits_of_its_own_class(tmp_path, model_type, sizes):
    model = save_model(tmp_path / "dense", model_type=model_type, **sizes)
    folder = tmp_path / "deci"
    for _ in range(2):  # an export replaces an older one
        write_deci(Checkpoint(str(model)), Directory(str(folder)))
    assert_hashes_hold(folder)
    dense = AutoModelForCausalLM.from_pretrained(model)
    assert torch.allclose(logits(stock_llama(folder)), logits(dense), atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "sizes", "why"),
    [
        ("mistral", {"sliding_window": 8}, "no sliding window"),
        ("granite", {}, "a Llama, and this is a granite"),
        ("llama", {"hidden_act": "gelu"}, "silu, not gelu"),
    ],
)
def test_a_model_that_the_form_cannot_express_is_refused(tmp_path, model_type, sizes, why):
    model = save_model(tmp_path / "dense", model_type=model_type, **sizes)
    with pytest.raises(ConfigError, match=why):
        write_deci(Checkpoint(str(model)), Directory(str(tmp_path / "deci")))
    assert not (tmp_path / "deci").exists()


def test_what_is_quantised_is_exported_as_it_is(tmp_path):
    model = save_model(tmp_path / "dense", intermediate_size=512)
    step = {"method": "gptq", "options": {"bits": 3, "group": 32, "head": 8}}
    compress_local(model, tmp_path / "run", steps=[step])
    result, folder = Checkpoint(str(tmp_path / "run/model")), tmp_path / "deci"
    found = write_deci(result, Directory(str(folder)))
    assert found.parameters_added == 0
    assert found.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model)
                                   .parameters())  # fmt: skip
    assert_hashes_hold(folder)
    exported = Checkpoint(str(folder))
    assert exported.schemes == result.schemes
    assert "lm_head" in exported.schemes
    for name in result.locations.keys() | exported.locations.keys():
        assert torch.equal(exported.read_stored(name), result.read_stored(name)), name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.total_bytes


def test_what_is_quantised_and_would_need_padding_is_refused(tmp_path):
    dense = Checkpoint(str(save_model(tmp_path / "dense")))
    config = {**dense.config, "quantization_config": {}}
    with pytest.raises(ConfigError, match="FFN of layer 0 has 56 units") as refused:
        deci_widths(dense.shape, dense.form, config)
    assert "--multiple-of 256" in refused.value.hint


def test_a_result_with_narrower_heads_is_refused_with_the_options_of_one_that_fits(tmp_path):
    model = save_model(tmp_path / "dense")
    compress_local(model, tmp_path / "run", method="modegpt", keep_fraction=0.7,
                   options={"allocation": "uniform"})  # fmt: skip
    with pytest.raises(ConfigError, match="attention of layer 0 has narrower heads") as refused:
        write_deci(Checkpoint(str(tmp_path / "run/model")), Directory(str(tmp_path / "deci")))
    assert "--option modules=mlp --multiple-of 256" in refused.value.hint


def test_the_config_crosses_a_process_as_engines_send_it(tmp_path):
    model = save_model(tmp_path / "dense")
    write_deci(Checkpoint(str(model)), Directory(str(tmp_path / "deci")))
    config = AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.block_configs[0].ffn.intermediate_size == 256
        assert not hasattr(other.block_configs[0].ffn, "hidden_act")


def test_another_model_is_not_overwritten(tmp_path):
    model = save_model(tmp_path / "dense")
    with pytest.raises(ConfigError, match="holds another model"):
        write_deci(Checkpoint(str(model)), Directory(str(model)))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "give --point or --format"),
        (("--format", "deci", "--point", "svdllm-0.8"), "give --point or --format"),
        (("--format", "deci"), "is not READY"),
        (("--point", "svdllm-0.8", "--out", "x"), "--out: is for --format"),
    ],
)
def test_an_export_that_makes_no_sense_is_refused(tmp_path, words, why):
    done = CliRunner().invoke(cli, ["export", str(tmp_path), *words])
    assert isinstance(done.exception, ConfigError)
    assert why in str(done.exception)
