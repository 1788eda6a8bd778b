"""A result as its users load it, against transformers' own model with the same weights."""

import copy
import importlib.metadata
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from actors.modeling.travelling import classes, code_of
from actors.storage.checkpoint import Checkpoint
from actors.storage.sources import embedded_model
from actors.worker.evaluator import _stagewise_logits
from orchestrator.prepare.model_config import result_config, stored
from orchestrator.prepare.prepare import longest_sequence
from planners.model.cost import dense_model_form
from tests.builders import SIZES, compress_local, save_model

LENGTH, PREFILL = 20, 6
TYPES = ("llama", "mistral", "qwen2")
WINDOW = st.sampled_from((3, 8))
ABSENT = object()
HEAD_DIM = 8
ROPE = st.sampled_from((
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_theta": 300.0},
    {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0,
                         "original_max_position_embeddings": 10, "mscale": 0.7}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4,
                      "long_factor": [2.0, 3.0, 4.0, 5.0],
                      "original_max_position_embeddings": 16}},
))  # fmt: skip
BY_LENGTH = ("dynamic", "longrope")  # the angles of a token depend on how many follow

# Read by all three.
READ = {
    "head_dim": st.just(HEAD_DIM),
    "hidden_act": st.sampled_from(("gelu", "relu")),
    "num_key_value_heads": st.sampled_from((1, 4)),
    "rms_norm_eps": st.just(1e-2),
    "max_position_embeddings": st.sampled_from((16, 64)),
    "tie_word_embeddings": st.just(True),
    "attention_dropout": st.just(0.5),
    "use_cache": st.just(False),
}
# Read by some models of transformers, and by the caches of all; by none of these layers.
IGNORED = {
    "attention_chunk_size": st.just(4),
    "logit_scale": st.just(0.1),
    "logits_scaling": st.just(9.0),
    "attn_logit_softcapping": st.just(1.0),
    "final_logit_softcapping": st.just(1.0),
    "residual_multiplier": st.just(3.0),
    "no_rope_layers": st.just([0, 0, 0]),
    "is_causal": st.just(True),
    "note": st.just("mine"),
}
KINDS = st.lists(st.sampled_from(("full_attention", "sliding_attention")), min_size=3, max_size=3)
OWN = {
    "llama": {
        "num_key_value_heads": st.sampled_from((1, 4, None)),
        "attention_bias": st.just(True),
        "mlp_bias": st.just(True),
        "sliding_window": WINDOW,
        "use_sliding_window": st.just(True),
        "max_window_layers": st.just(1),
        "layer_types": KINDS,
    },
    "mistral": {
        "sliding_window": st.one_of(WINDOW, st.none()),
        "attention_bias": st.just(True),
        "mlp_bias": st.just(True),
        "use_sliding_window": st.just(False),
        "max_window_layers": st.just(1),
    },
    "qwen2": {
        "use_sliding_window": st.booleans(),
        "sliding_window": WINDOW,
        "max_window_layers": st.integers(0, 3),
        "attention_bias": st.just(False),
        "mlp_bias": st.just(True),
    },
}


@st.composite
def configs(draw):
    """Return the keys of a config.json of a small model that transformers takes."""
    model_type = draw(st.sampled_from(TYPES))
    config = {**SIZES, "model_type": model_type, **draw(ROPE)}
    for key, values in {**READ, **IGNORED, **OWN[model_type]}.items():
        if draw(st.booleans()):
            config[key] = draw(values)
    if model_type == "qwen2" and config.get("use_sliding_window"):
        config.setdefault("sliding_window", 5)
        if draw(st.booleans()):
            config["layer_types"] = draw(KINDS)
    return config


def write_dense(folder, config):
    """Write a random model with just these keys in its config.json."""
    folder.mkdir(parents=True)
    rest = {k: copy.deepcopy(v) for k, v in config.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * (0.6 if tensor.ndim == 2 else 0.2)
        + ("norm" in name)
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.get("tie_word_embeddings"))
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_result(folder, dense, *, native=False):
    """Write the result of full width: the same weights, and the config and code of a result."""
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(str(dense))
    form = replace(dense_model_form(checkpoint.shape), native=native)
    config = stored(result_config(checkpoint.config, checkpoint.shape, form))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    if not native:
        (folder / "modeling_compressed.py").write_bytes(code_of(config["model_type"]))
    return folder


def loaded(folder, **how):
    how = {"trust_remote_code": True, "local_files_only": True, **how}
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def some_ids(count=2, length=LENGTH):
    return torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(1))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@torch.inference_mode()
def token_by_token(model, ids):
    """Return the logits of a prompt and of every token that follows it through the cache."""
    out = model(ids[:, :PREFILL], use_cache=True)
    logits = [out.logits]
    for at in range(PREFILL, ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@torch.inference_mode()
def check_config(folder, config, attention):
    dense_folder = write_dense(folder / "dense", config)
    dense = loaded(dense_folder, attn_implementation=attention)
    result = loaded(write_result(folder / "result", dense_folder), attn_implementation=attention)
    ids = some_ids()
    expected = dense(ids, use_cache=False).logits
    same(result(ids).logits, expected)
    rope = result.config.rope_parameters["rope_type"]
    if rope not in BY_LENGTH:
        same(token_by_token(result, ids), expected)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    seen = mask.bool()
    same(result(ids, **padded).logits[seen], dense(ids, use_cache=False, **padded).logits[seen])
    short = ids[:, : min(LENGTH, longest_sequence(config))]
    fresh = loaded(dense_folder, attn_implementation=attention)  # dynamic angles remember a length
    expected = fresh(short, use_cache=False).logits
    for each in (folder / "dense", folder / "result"):
        same(_stagewise_logits(Checkpoint(str(each)), short, "llama", "cpu"), expected)


DYNAMIC = {**SIZES, "model_type": "mistral", "max_position_embeddings": 16,
           "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}  # fmt: skip


@given(config=configs(), attention=st.sampled_from(("sdpa", "eager")))
@example(config=DYNAMIC, attention="sdpa")
@settings(max_examples=8)
def test_at_full_width_any_config_gives_the_logits_of_transformers(
    tmp_path_factory, config, attention
):
    check_config(tmp_path_factory.mktemp("model"), config, attention)


@pytest.mark.nightly
@given(config=configs(), attention=st.sampled_from(("sdpa", "eager")))
@settings(max_examples=200)
def test_at_full_width_each_of_many_configs_gives_the_logits_of_transformers(
    tmp_path_factory, config, attention
):
    check_config(tmp_path_factory.mktemp("model"), config, attention)


WINDOWED = {
    "llama": {"sliding_window": 3, "layer_types": ["sliding_attention"] * 3},
    "mistral": {"sliding_window": 3},
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2},
}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_window_is_kept_past_its_end_where_the_architecture_has_one(tmp_path, model_type):
    config = {**SIZES, "model_type": model_type, **WINDOWED[model_type]}
    check_config(tmp_path, config, "sdpa")
    far = loaded(tmp_path / "result")
    ids = some_ids(1)
    changed = ids.clone()
    changed[0, 0] = 3 if ids[0, 0] != 3 else 4
    with torch.inference_mode():
        moved = (far(ids).logits[:, -1] - far(changed).logits[:, -1]).abs().max()
    assert (moved == 0) == (model_type == "mistral")  # 3 layers of window 3 reach 6 tokens back


def test_a_stock_llama_result_forgets_keys_that_only_its_cache_obeys(tmp_path):
    keys = {**WINDOWED["llama"], "attention_chunk_size": 4}
    dense = write_dense(tmp_path / "dense", {**SIZES, "model_type": "llama", **keys})
    result = loaded(write_result(tmp_path / "result", dense, native=True))
    with torch.inference_mode():
        same(token_by_token(result, some_ids()), loaded(dense)(some_ids(), use_cache=False).logits)


def test_a_result_stops_where_its_input_stops(tmp_path):
    config = {k: v for k, v in SIZES.items() if not k.endswith("_token_id")}
    dense = write_dense(tmp_path / "dense", {**config, "model_type": "qwen2"})
    result = loaded(write_result(tmp_path / "result", dense))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(result.generation_config, key) == getattr(
            loaded(dense).generation_config, key
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Qwen2 with a window in some layers, and its result of full width."""
    folder = tmp_path_factory.mktemp("pair")
    config = {**SIZES, "model_type": "qwen2", **WINDOWED["qwen2"], "attention_dropout": 0.3}
    dense = write_dense(folder / "dense", config)
    return dense, write_result(folder / "result", dense)


def eager(folder):
    return loaded(folder, attn_implementation="eager")


@torch.inference_mode()
def test_hidden_states_and_attentions_are_those_of_the_dense_model(pair):
    ids = some_ids()
    asked = {"output_hidden_states": True, "output_attentions": True, "labels": ids}
    expected, found = (eager(folder)(ids, **asked) for folder in pair)
    assert list(found) == list(expected)
    assert len(found.hidden_states) == 4
    assert len(found.attentions) == 3
    for name in ("hidden_states", "attentions"):
        for one, other in zip(found[name], expected[name], strict=True):
            same(one, other)
    same(found.loss, expected.loss)


@torch.inference_mode()
def test_outputs_come_as_the_tuples_that_are_asked_for(pair):
    ids = some_ids()
    for asked in ({}, {"labels": ids}, {"output_hidden_states": True, "use_cache": False}):
        expected, found = (eager(folder)(ids, return_dict=False, **asked) for folder in pair)
        assert [type(part) for part in found] == [type(part) for part in expected]
        bodies = [eager(folder).model(ids, return_dict=False) for folder in pair]
        assert [type(part) for part in bodies[1]] == [type(part) for part in bodies[0]]


@torch.inference_mode()
def test_what_a_caller_may_pass_does_what_it_does_to_the_dense_model(pair):
    dense, result = (loaded(folder) for folder in pair)
    ids = some_ids()
    packed = torch.cat((torch.arange(8), torch.arange(LENGTH - 8)))[None].expand(2, -1)
    for asked in (
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.tensor([1, 4])},
        {"logits_to_keep": torch.tensor([[1, 4], [2, 3]])},
        {"logits_to_keep": ids > 30},
        {"position_ids": torch.arange(LENGTH)[None] + 5},
        {"position_ids": packed, "use_cache": False},
        {"inputs_embeds": dense.get_input_embeddings()(ids), "input_ids": None},
    ):
        asked = {"input_ids": ids, **asked}
        same(result(**asked).logits, dense(**asked).logits)
    assert result(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static cache"],
)
def test_generation_past_a_window_is_that_of_the_dense_model(pair, how):
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **how}
    dense, result = (loaded(folder).generate(some_ids(), **how) for folder in pair)
    assert torch.equal(dense, result)


def gradients(folder, **checkpointing):
    """Return name -> gradient of the loss of one step, with dropout as it falls with seed 0."""
    model = eager(folder).train()
    if checkpointing:
        with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
    torch.manual_seed(0)
    model(some_ids(), labels=some_ids()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def all_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        same(found[name], gradient)


def test_gradients_are_those_of_the_dense_model_dropout_included(pair):
    all_same(gradients(pair[1]), gradients(pair[0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(pair, reentrant):
    all_same(gradients(pair[1], use_reentrant=reentrant), gradients(pair[1]))


RECIPES = {
    "slicegpt": {"method": "slicegpt", "slice": 0.25, "options": {"rotation": "per_site"}},
    "modegpt": {"method": "modegpt", "keep_fraction": 0.7},
    "svdllm": {"method": "svdllm", "keep_fraction": 0.7},
}


@pytest.fixture(scope="module", params=sorted(RECIPES))
def compressed(request, tmp_path_factory):
    """The result of a method."""
    folder = tmp_path_factory.mktemp("compressed")
    compress_local(save_model(folder / "model"), folder / "run", **RECIPES[request.param])
    return folder / "run/model"


def test_a_step_of_training_lowers_the_loss_of_every_method_s_result(compressed):
    all_same(gradients(compressed, use_reentrant=False), gradients(compressed))
    model = eager(compressed).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(some_ids(), labels=some_ids()).loss
    before.backward()
    optimizer.step()
    assert model(some_ids(), labels=some_ids()).loss < before


@torch.inference_mode()
def test_a_result_saved_again_is_the_same_result(compressed, tmp_path):
    model = loaded(compressed)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_compressed.py").read_bytes() == code_of("llama")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (compressed, tmp_path)
    )
    assert before.items() <= {"pretraining_tp": 1, "attention_bias": False, **after}.items()
    assert torch.equal(loaded(tmp_path)(some_ids()).logits, model(some_ids()).logits)
    with pytest.raises(KeyError, match="trust_remote_code=True"):
        loaded(tmp_path, trust_remote_code=None)


def test_a_config_survives_copies_and_pickles(compressed):
    config = AutoConfig.from_pretrained(compressed, trust_remote_code=True, local_files_only=True)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.hidden_act == "silu"


@torch.inference_mode()
def test_a_vocabulary_may_grow(compressed):
    model = loaded(compressed)
    before = model(some_ids()).logits
    model.resize_token_embeddings(70)
    after = model(some_ids()).logits
    assert after.shape[-1] == model.config.vocab_size == 70
    same(after[..., :61], before)


@pytest.mark.parametrize("trust", [None, False])
def test_no_stock_model_is_built_around_weights_that_need_code(compressed, trust):
    stock = (AutoModel, AutoModelForCausalLM, transformers.LlamaForCausalLM)
    for each in stock:
        with pytest.raises(KeyError, match="made by compress-cluster: load it with trust_remote"):
            each.from_pretrained(compressed, trust_remote_code=trust, local_files_only=True)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A model with a tokenizer, and a result of it that needs code."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_model(folder / "model", vocab_size=512)
    for name in TOKENIZER:
        (folder / "model" / name).write_bytes((embedded_model() / name).read_bytes())
    compress_local(folder / "model", folder / "run")
    return folder / "model", folder / "run/model"


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEXTS = ["def main(): return 1", " ünï  "]
ENCODE = """
import sys, json
from transformers import AutoTokenizer
for path in sys.argv[2:]:
    found = AutoTokenizer.from_pretrained(path)
    print(json.dumps([type(found).__name__, found(json.loads(sys.argv[1]))["input_ids"]]))
"""


def test_a_tokenizer_loads_without_a_question_and_is_that_of_the_input(with_tokenizer, tmp_path):
    folders = [*with_tokenizer, tmp_path / "model", tmp_path / "result"]
    for old, new in zip(folders[:2], folders[2:], strict=True):  # where config.json decides
        new.mkdir()
        (new / "config.json").write_bytes((old / "config.json").read_bytes())
        (new / "tokenizer.json").write_bytes((old / "tokenizer.json").read_bytes())
        content = json.loads((old / "tokenizer_config.json").read_text())
        del content["tokenizer_class"]
        (new / "tokenizer_config.json").write_text(json.dumps(content))
    silent, other_end = os.pipe()  # an input that stays open and says nothing
    try:
        said = subprocess.run(
            [sys.executable, "-c", ENCODE, json.dumps(TEXTS), *map(str, folders)],
            stdin=silent, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    finally:
        os.close(silent)
        os.close(other_end)
    assert "[y/N]" not in said.stdout + said.stderr
    named, named_result, plain, plain_result = said.stdout.strip().splitlines()
    assert named_result == named
    assert plain_result == plain
    assert len(json.loads(named)[1]) == len(TEXTS)


def test_the_card_and_the_config_name_the_least_transformers(with_tokenizer):
    _, result = with_tokenizer
    least = classes("llama").LEAST_TRANSFORMERS
    requires = json.loads((result / "config.json").read_text())["compression"]["requires"]
    assert requires == f"transformers>={least}"
    card = (result / "README.md").read_text()
    assert f"needs `{requires}`" in card
    assert "The tokenizer needs no code" in card
    ours = [r for r in importlib.metadata.requires("compress-cluster") if "transformers" in r]
    assert [re.search(r">=([\d.]+)", each)[1] for each in ours] == [least]


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1"])
def test_the_code_of_a_result_names_the_transformers_that_is_too_old(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError) as raised:
        exec(
            compile(code_of("llama"), "modeling_compressed.py", "exec"), {"__name__": "of_a_result"}
        )
    assert str(raised.value) == (
        f"this model needs transformers 5.17 or later, and found {version}: "
        "pip install -U 'transformers>=5.17'"
    )


OLD = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
"""


@pytest.mark.nightly
def test_a_result_under_transformers_4_57_fails_when_it_is_loaded(with_tokenizer, tmp_path):
    wanted = ["transformers==4.57.*", "huggingface_hub<1.0", "tokenizers>=0.22,<=0.23"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    done = subprocess.run([*install, str(tmp_path), *wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed: {done.stderr.strip()[-200:]}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for trust, words in (
        ("True", "ImportError: this model needs transformers 5.17 or later, and found 4.57"),
        ("False", "made by compress-cluster: load it with trust_remote_code=True"),
    ):
        said = subprocess.run(
            [sys.executable, "-c", OLD, str(with_tokenizer[1]), trust],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert said.returncode == 1
        assert words in said.stderr.strip().splitlines()[-1]
