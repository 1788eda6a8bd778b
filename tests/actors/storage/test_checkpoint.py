"""Checkpoints as programs other than save_pretrained leave them, beside what transformers loads."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.storage import checkpoint as module
from actors.storage.checkpoint import Checkpoint
from orchestrator.prepare.prepare import prepare
from planners.errors import ModelError
from planners.families import family_of
from tests.builders import (
    VOCABULARY,
    compress_local,
    logits_of,
    prepared_run,
    run_local,
    save_model,
    save_tokens,
)
from tests.families.tiny import config_of, model_of

IDS = torch.tensor([[1, 5, 9, 12, 33, 60], [7, 7, 0, 2, 41, 3]])
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def changed(folder, weights, **config):
    """Apply a function to the tensors of a model, and change keys of its config."""
    tensors = weights(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**json.loads((folder / "config.json").read_text()), **config}
    kept = {k: v for k, v in values.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def mixed(folder, wide, **config):
    """Store all but the tensors whose names have one of some words in bfloat16."""

    def narrow(tensors):
        return {n: t if any(w in n for w in wide) else t.bfloat16() for n, t in tensors.items()}

    return changed(folder, narrow, **{"dtype": "bfloat16", **config})


def headless(folder):
    """Leave out what AutoModel leaves out when it saves a tied model."""

    def bare(tensors):
        return {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}

    return changed(folder, bare, architectures=["LlamaModel"])


def linked(folder):
    """Move the weights to a store beside the model, and link to it."""
    store = folder.parent / "store"
    store.mkdir(exist_ok=True)
    shutil.move(folder / "model.safetensors", store / "w.safetensors")
    (folder / "model.safetensors").symlink_to(store / "w.safetensors")
    return folder


def data_bytes(folder):
    """Return the bytes of all weights in the files of a model, not of the pairs kept of rope."""
    tensors = [t for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    return sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())


@pytest.mark.parametrize(
    ("wide", "config"),
    [
        (["norm"], {}),
        (["norm"], {"dtype": None, "torch_dtype": "bfloat16"}),
        (["norm"], {"torch_dtype": "float32"}),  # dtype comes before its old name
        (["norm", "lm_head"], {}),
        (["embed_tokens"], {}),
        (["layers.1.self_attn.q_proj"], {}),
        (["norm"], {"dtype": "float32"}),
    ],
)
def test_weights_of_several_dtypes_are_read_as_transformers_loads_them(tmp_path, wide, config):
    folder = mixed(save_model(tmp_path / "model"), wide, **config)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.locations.keys() == theirs.keys()
    for name, tensor in theirs.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    assert checkpoint.shape.dtype == str(theirs["model.norm.weight"].dtype).removeprefix("torch.")
    assert checkpoint.total_bytes == data_bytes(folder), "of the files, whatever they are read in"


def test_a_tensor_of_another_dtype_is_the_same_in_blocks(tmp_path, monkeypatch):
    folder = mixed(save_model(tmp_path / "model"), ["embed_tokens"])
    name = "model.embed_tokens.weight"
    whole = load_file(folder / "model.safetensors")[name].bfloat16()
    monkeypatch.setattr(module, "BLOCK_BYTES", 300)  # two rows and a bit
    checkpoint = Checkpoint(str(folder))
    assert torch.equal(checkpoint.read(name), whole)
    for rows in (None, 17):
        blocks = list(checkpoint.read_blocks(name, rows=rows))
        assert len(blocks) > 2
        assert torch.equal(torch.cat(blocks), whole)


def test_a_model_that_was_saved_without_its_head_has_the_names_of_the_whole(tmp_path):
    whole = save_model(tmp_path / "whole", tie_word_embeddings=True)
    bare = headless(shutil.copytree(whole, tmp_path / "bare"))
    assert torch.equal(logits_of(bare, IDS), logits_of(whole, IDS)), "transformers loads it so"
    found, expected = Checkpoint(str(bare)), Checkpoint(str(whole))
    assert found.shape == expected.shape
    for name in expected.locations:
        assert torch.equal(found.read(name), expected.read(name))


@torch.inference_mode()
def plain_perplexity(folder):
    """Return the perplexity of the weights that transformers loads, computed in float64."""
    ids = load_file(folder / "tokens" / "evaluation.safetensors")["input_ids"]
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").double().eval()
    log_p = found(ids).logits[:, :-1].log_softmax(-1)
    return float(log_p.gather(-1, ids[:, 1:, None]).mean().neg().exp())


def sources(folder):
    """Return kind -> a model, and keys of the recipe for it."""
    return {
        "mixed": (mixed(save_model(folder / "mixed"), ["norm", "lm_head"]), {}),
        "headless": (headless(save_model(folder / "headless", tie_word_embeddings=True)), {}),
        "linked": (linked(save_model(folder / "linked")), {"model_store": str(folder / "store")}),
    }


@pytest.mark.parametrize("kind", ["mixed", "headless", "linked"])
def test_a_result_of_full_width_has_the_logits_that_transformers_gets_of_the_input(tmp_path, kind):
    folder, keys = sources(tmp_path)[kind]
    losses = compress_local(folder, tmp_path / "run", method="slicegpt", slice=0.0, **keys)
    assert losses["dense"] == pytest.approx(plain_perplexity(folder), rel=1e-5)
    model = tmp_path / "run" / "model"
    config = json.loads((model / "config.json").read_text())
    ours = "auto_map" in config
    found, expected = logits_of(model, IDS, trust_remote_code=ours), logits_of(folder, IDS)
    size = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= TOLERANCE[config["dtype"]] * max(size, 1)
    assert config["architectures"] == ["CompressedForCausalLM" if ours else "LlamaForCausalLM"]
    assert "torch_dtype" not in config


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["mixed", "headless", "linked"])
@pytest.mark.parametrize("method", ["slicegpt", "modegpt", "svdllm"])
def test_a_whole_run_is_ready_and_its_bytes_are_those_of_the_files(tmp_path, kind, method):
    folder, keys = sources(tmp_path)[kind]
    options = {"method": method, "keep_fraction": 0.9, **keys}
    plan = prepared_run(folder, tmp_path / "run", **options).plan
    report = run_local(folder, tmp_path / "run", **options)
    assert report["verdict"] == "READY"
    written = data_bytes(tmp_path / "run" / "model")
    final = report["parameters"]["after"] * plan.bytes_after // plan.parameters_after
    assert written == final
    assert report["bytes"]["before"] == data_bytes(folder)
    weights = [p.stat().st_size for p in (tmp_path / "run" / "model").glob("*.safetensors")]
    assert report["bytes"]["after"] >= sum(weights) >= written


@pytest.mark.nightly
def test_a_second_step_reads_what_a_first_made_of_weights_of_several_dtypes(tmp_path):
    folder = mixed(save_model(tmp_path / "model"), ["norm"])
    steps = [
        {"method": "modegpt", "keep_fraction": 0.9},
        {"method": "slicegpt", "keep_fraction": 0.8},
    ]
    assert run_local(folder, tmp_path / "run", steps=steps)["verdict"] == "READY"


def test_roles_are_the_familys_whatever_the_tensors_are_called(tmp_path):
    family, folder = family_of("opt"), tmp_path / "model"
    model_of(config_of("opt", vocab_size=VOCABULARY)).float().save_pretrained(folder)
    save_tokens(tmp_path / "tokens.safetensors", 16, length=16)
    source = f"tokens:{tmp_path}/tokens.safetensors"
    compress_local(
        folder, tmp_path / "run", method="modegpt", keep_fraction=0.9,
        calibration={"source": source}, evaluation={"source": source},
        options={"round_to": 2, "allocation": "uniform"},
    )  # fmt: skip
    model = tmp_path / "run" / "model"
    files = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    outer = (family.embedding, family.head, family.final_norm, family.positions)
    assert len({files[name] for name in outer}) == len(outer)
    before = load_file(folder / "model.safetensors")
    for name in (*outer, family.norm_bias):
        assert torch.equal(load_file(model / files[name])[name], before[name])


def test_a_worker_is_refused_the_links_that_its_driver_was_not_allowed(tmp_path):
    folder = linked(save_model(tmp_path / "model"))
    prepared = prepared_run(folder, tmp_path / "run", model_store=str(tmp_path / "store"))
    assert prepare(prepared.config).config.model_store == os.path.realpath(tmp_path / "store")
    with pytest.raises(ModelError, match="outside the model's directory"):
        Checkpoint(prepared.model_uri)
    with pytest.raises(ModelError, match="outside the model's directory"):
        Checkpoint(prepared.model_uri, model_store=str(tmp_path / "run"))
