"""A native result as programs meet it that know nothing of us: its files and their names."""

import json

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
