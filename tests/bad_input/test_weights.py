"""Tensors that are missing, of another kind, or no numbers: refused by name before a worker is."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.storage import checkpoint
from planners.errors import ModelError
from tests.bad_input.conftest import ABSENT
from tests.bad_input.refusals import attempt
from tests.builders import run_local

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def weights(model):
    """Return a function that replaces tensors of the model; None removes one."""
    path = model / "model.safetensors"

    def change(**tensors):
        kept = {**load_file(path), **{name.replace("__", "."): t for name, t in tensors.items()}}
        save_file({name: t for name, t in kept.items() if t is not None}, path)

    return change


def test_a_missing_tensor_is_refused_by_name(refused, weights):
    weights(**{Q: None})
    refused(ModelError, f"tensor {Q} is missing from the weights")


@pytest.mark.parametrize("shape", [(32,), (31, 32), (32, 32, 1), (1024,), (0, 32)])
def test_a_wrong_shape_is_refused_with_both(refused, weights, shape):
    weights(**{Q: torch.zeros(shape)})
    refused(ModelError, f"tensor {Q} has shape {list(shape)}; config.json requires [32, 32]")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.int64, "I64"), (torch.bool, "BOOL")]
)
def test_integers_are_refused_as_quantised(refused, weights, dtype, name):
    weights(**{Q: torch.ones(32, 32, dtype=dtype)})
    refused(ModelError, f"tensor {Q} is {name}; supported: F32, BF16, F16", "use the original")


def test_double_precision_is_refused(refused, weights):
    weights(**{Q: torch.ones(32, 32, dtype=torch.float64)})
    refused(ModelError, f"tensor {Q} is F64; supported")


def test_float8_is_refused(refused, weights):
    weights(**{Q: torch.ones(32, 32).to(torch.float8_e4m3fn)})
    refused(ModelError, f"tensor {Q} is F8_E4M3; supported: ", "use the original weights")


@pytest.mark.parametrize("asked", ["float16", None, ABSENT], ids=["another", "null", "none"])
def test_several_dtypes_of_which_the_config_names_none_are_refused_until_it_does(
    refused, model, weights, edit, tmp_path, asked
):
    weights(**{Q: torch.ones(32, 32, dtype=torch.bfloat16)})
    edit("config.json", dtype=asked)
    place = f"model.safetensors: tensor {Q!r} is bfloat16, others are float32, and the dtype in"
    refused(ModelError, place, 'set "dtype" in config.json to "float32"')
    edit("config.json", dtype="float32")
    assert attempt(model, tmp_path / "run").plan.shape.dtype == "float32"


@pytest.mark.parametrize("name", [Q, NORM])
def test_what_float16_cannot_hold_is_refused_with_its_name(refused, weights, edit, name):
    edit("config.json", dtype="float16")
    large = torch.full((32, 32) if name == Q else (32,), 7e4)
    half = torch.zeros(512, 32, dtype=torch.float16)
    weights(**{name: large, "lm_head.weight": half})
    entries = large.numel()
    said = f"tensor {name} has {entries} entries that are NaN or infinite in float16, whose largest"
    refused(ModelError, said, "bfloat16 or float32 weights", "config.json")


def test_infinite_float16_weights_are_refused_as_float16(refused, weights):
    weights(**{NORM: torch.full((32,), math.inf, dtype=torch.float16)})
    refused(ModelError, f"{NORM} has 32 entries that are NaN or infinite in float16, whose largest")


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        ("module.{}", "module"),
        ("_orig_mod.{}", "_orig_mod"),
        ("module._orig_mod.{}", "module._orig_mod"),
        ("language_model.{}", "language_model"),
        ("base_model.model.{}", "base_model.model"),
        ("model.language_{}", "language_model"),
    ],
)
def test_names_of_a_wrapper_are_refused_with_what_it_is(refused, model, weights, wrapper, said):
    tensors = load_file(model / "model.safetensors")
    weights(**dict.fromkeys(tensors), **{wrapper.format(n): t for n, t in tensors.items()})
    refused(
        ModelError, f"{said!r} in the names comes from a wrapper around", "save the unwrapped model"
    )


def test_names_of_a_wrapper_around_each_layer_are_refused_with_what_it_is(refused, weights):
    inner = Q.replace("self_attn", "_orig_mod.self_attn")
    weights(**{Q: None, inner: torch.ones(32, 32)})
    refused(ModelError, f"tensor {Q} is stored as {inner!r}", "'_orig_mod' in the names")


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_model_without_a_head_that_is_not_tied_is_refused(
    refused, model, weights, edit, prefixed
):
    edit("config.json", architectures=["LlamaModel"])
    tensors = load_file(model / "model.safetensors")
    bare = {n.removeprefix("model."): t for n, t in tensors.items()}
    changed = {} if prefixed else {**dict.fromkeys(tensors), **bare}
    weights(**{**changed, "lm_head.weight": None})
    refused(ModelError, "the model has no head: tensor lm_head.weight is missing", "'LlamaModel'")


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_refused_with_its_class(refused, weights, edit, tied):
    edit("config.json", architectures=["LlamaForSequenceClassification"], tie_word_embeddings=tied)
    weights(**{"lm_head.weight": None, "score.weight": torch.ones(2, 32)})
    said = "'score.weight' does not belong to the model" if tied else "the model has no head"
    refused(ModelError, said, "LlamaForSequenceClassification", "LlamaForCausalLM is needed")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [Q, NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_what_is_no_number_is_refused_by_tensor(refused, model, weights, name, value):
    tensor = load_file(model / "model.safetensors")[name]
    tensor.view(-1)[-1] = value
    weights(**{name: tensor})
    refused(ModelError, f"tensor {name} has 1 entries that are NaN or infinite")


def test_values_are_looked_at_in_blocks(refused, model, weights, monkeypatch):
    tensor = load_file(model / "model.safetensors")[Q]
    tensor[17, 3] = math.nan
    weights(**{Q: tensor})
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 300)  # two rows and a bit
    refused(ModelError, f"tensor {Q} has 1 entries that are NaN or infinite")


def test_values_of_a_large_model_are_looked_at_unless_it_is_only_planned_for(
    refused, model, weights, monkeypatch, tmp_path
):
    weights(**{NORM: torch.full((32,), math.nan)})
    monkeypatch.setattr(checkpoint, "SMALL_BYTES", 1000)
    assert attempt(model, tmp_path / "run", only_plan=True).plan.keep_fraction < 1
    refused(ModelError, f"tensor {NORM} has 32 entries that are NaN or infinite")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "visual.patch_embed.weight",
        "",
    ],
)
def test_a_tensor_that_the_config_does_not_know_is_refused(refused, weights, name):
    weights(**{name: torch.ones(32)})
    refused(ModelError, f"tensor {name!r} does not belong to the model that config.json describes")


def test_stored_rotary_tables_are_no_error(model, weights, tmp_path):
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)]
    weights(**{name: torch.ones(4) for name in names})
    found = attempt(model, tmp_path / "run")
    assert not set(names) & checkpoint.Checkpoint(found.model_uri).locations.keys()


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_no_error(
    model, weights, edit, tmp_path
):
    edit("config.json", tie_word_embeddings=True)
    table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    weights(**{"lm_head.weight": table.clone()})
    tied = attempt(model, tmp_path / "run")
    weights(**{"lm_head.weight": None})
    assert tied.plan.parameters_before == attempt(model, tmp_path / "run").plan.parameters_before


def test_a_tied_head_of_another_shape_is_refused(refused, weights, edit):
    edit("config.json", tie_word_embeddings=True)
    weights(**{"lm_head.weight": torch.ones(511, 32)})
    refused(ModelError, "tensor lm_head.weight has shape [511, 32]; config.json requires [512, 32]")


def test_a_config_without_weights_is_refused(refused, model):
    (model / "model.safetensors").unlink()
    refused(ModelError, str(model), "has a config.json but no weights (model.safetensors or")


def test_weights_that_are_a_folder_are_refused(refused, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    refused(ModelError, "has a config.json but no weights")


def test_a_truncated_download_is_refused(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(ModelError, "model.safetensors: truncated or padded: its tensors end at byte")


def test_weights_of_another_dtype_than_the_config_says_are_compressed(model, edit, tmp_path):
    edit("config.json", dtype="bfloat16")  # as in many models that were tuned and saved again
    assert run_local(model, tmp_path / "run")["verdict"] == "READY"
