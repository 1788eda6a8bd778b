"""The damage of a cut as the rise of the loss, against transformers' own model with that cut."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors import methods
from actors.methods import modegpt
from actors.numerics.nystrom import nystrom
from actors.storage.checkpoint import Checkpoint
from planners.model.form import dense_form
from tests.builders import compress_local, prepared_run, save_model

RECIPE = {
    "method": "modegpt",
    "keep_fraction": 0.8,
    "options": {"damage": "loss", "modules": "mlp", "grid": "0.5", "probe_tokens": 100},
}


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def model(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


def rise_of_loss(model, ids, layer, cut):
    """Return how much a model's loss rises where a layer has these narrower MLP weights."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        before = dense(ids, labels=ids).loss
        mlp = dense.model.layers[layer].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight, new = getattr(mlp, name).weight, cut[f"{name}.weight"]
            weight.zero_()  # a unit without weights is no unit
            weight[: new.shape[0], : new.shape[1]] = new
        return float(dense(ids, labels=ids).loss - before)


def test_damage_is_the_rise_of_the_loss_of_the_whole_model(model, tmp_path):
    out = tmp_path / "run"
    compress_local(model, out, keep_statistics=True, **RECIPE)
    options = prepared_run(model, out, **RECIPE).options
    checkpoint = Checkpoint(str(model))
    shape = checkpoint.shape
    ids = load_file(model / "tokens/calibration.safetensors")["input_ids"][: 100 // 24]
    for layer in range(shape.num_layers):
        sums = load_file(out / f"stats/layer-{layer:05d}.safetensors")
        said = json.loads((out / f"records/damage-layer-{layer:05d}.json").read_text())["values"]
        full, (width, damage) = said["curves"]["mlp"]
        assert full == [shape.intermediate, 0.0]
        cut, _ = methods.load("modegpt").compress(
            checkpoint.read_layer(layer), sums, shape=shape, options=options,
            form=replace(dense_form(shape), intermediate=int(width)),
        )  # fmt: skip
        assert damage == pytest.approx(rise_of_loss(model, ids, layer, cut), abs=2e-6)


def test_one_factorisation_serves_all_levels(model, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        modegpt, "nystrom", lambda *args, **how: calls.append(1) or nystrom(*args, **how)
    )

    def count(event):
        if event["kind"] == "phase begins":
            calls.append(event["unit"])

    options = {"modules": "mlp,vo", "grid": "0.75,0.5,0.25", "probe_tokens": 100}
    recipe = {"method": "modegpt", "keep_fraction": 0.8, "options": options}
    compress_local(model, tmp_path / "run", listener=count, **recipe)
    allocating = calls[calls.index("allocate") + 1 : calls.index("compress")]
    assert allocating == [1] * Checkpoint(str(model)).shape.num_layers
