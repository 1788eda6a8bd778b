"""Which file holds which tensor, as a stranger says it: nothing outside the model is ever read."""

import json
import os
import shutil

import pytest
from huggingface_hub import constants

from actors.storage.checkpoint import MAX_JSON_BYTES
from planners.errors import ConfigError, ModelError
from tests.bad_input.refusals import attempt, refusal
from tests.builders import save_model

NORM = "model.norm.weight"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A random model in several files."""
    folder = save_model(tmp_path_factory.mktemp("sound") / "model", max_shard_size="20KB")
    attempt(folder, folder / "run")
    return folder


@pytest.fixture
def place(model):
    """Return a function that sets where the index says that the final norm is."""

    def change(file):
        index = json.loads((model / "model.safetensors.index.json").read_text())
        index["weight_map"][NORM] = file
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


@pytest.fixture
def norm_file(model):
    """The file that holds the final norm."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][NORM]


def test_the_model_is_in_several_files(model):
    assert len(list(model.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "../model/model-00001-of-00009.safetensors",
        "/etc/secret.safetensors",
        "..\\secret.safetensors",
        "C:\\secret.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        ".safetensors",
        "..safetensors",
        "a\0b.safetensors",
        "a\nb.safetensors",
        "a\x1b[2Jb.safetensors",
        "\ud800.safetensors",
    ],
)
def test_a_file_elsewhere_is_refused(refused, place, file):
    place(file)
    refused(ModelError, NORM, repr(file), "the file must be in the model directory")


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "safetensors", "model.safetensors.bin", "", None, 1, [], {}]
)
def test_what_is_no_safetensors_file_is_refused(refused, place, file):
    place(file)
    refused(ModelError, NORM, repr(file), "only .safetensors files are supported")


def test_a_file_that_does_not_exist_is_refused(refused, place):
    place("missing.safetensors")
    refused(ModelError, "missing.safetensors", "does not exist")


def test_a_name_too_long_for_a_file_is_refused(refused, place):
    place("x" * 300 + ".safetensors")
    refused(ModelError, NORM, "xxx", "the file must be in the model directory")


def test_a_folder_in_place_of_a_file_is_refused(refused, place, model):
    (model / "folder.safetensors").mkdir()
    place("folder.safetensors")
    refused(ModelError, "folder.safetensors", "does not exist")


def test_a_pipe_in_place_of_a_file_is_refused(refused, place, model):
    os.mkfifo(model / "pipe.safetensors")  # opened, it would be waited for
    place("pipe.safetensors")
    refused(ModelError, "pipe.safetensors", "does not exist")


def test_a_tensor_that_is_not_in_the_file_named_is_refused(refused, place, model, norm_file):
    other = next(f for f in sorted(model.glob("model-*.safetensors")) if f != norm_file)
    place(other.name)
    refused(ModelError, NORM, f"is not in {other.name} as listed")


def test_a_tensor_that_is_nowhere_is_refused(refused, model):
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.more.weight"] = index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    refused(ModelError, "'model.more.weight' is not in model-")


def test_a_tensor_in_two_files_is_refused(refused, place, model, norm_file):
    shutil.copy(norm_file, model / "copy.safetensors")
    place("copy.safetensors")
    refused(ModelError, "is in both copy.safetensors and model-")


@pytest.mark.parametrize("weight_map", [{}, [], None, "model.safetensors", 3])
def test_an_index_without_a_map_is_refused(refused, edit, weight_map):
    edit("model.safetensors.index.json", weight_map=weight_map)
    refused(ModelError, "model.safetensors.index.json", "weight_map is missing or empty")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"{'weight_map'}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'"' + b"x" * MAX_JSON_BYTES, "too large for a model's JSON file"),
        (b'{"weight_map":[' + b"[]," * (MAX_JSON_BYTES // 3 - 10) + b"[]]}", "missing or empty"),
    ],
    ids=["empty", "not JSON", "not text", "nested", "array", "too large", "full of lists"],
)
def test_a_broken_index_is_refused(refused, model, data, words):
    (model / "model.safetensors.index.json").write_bytes(data)
    refused(ModelError, "model.safetensors.index.json", words)


def test_a_truncated_file_is_refused_by_name(refused, norm_file):
    norm_file.write_bytes(norm_file.read_bytes()[:-1])
    refused(ModelError, norm_file.name, "truncated")


def test_a_missing_file_is_refused_by_name(refused, norm_file):
    norm_file.unlink()
    refused(ModelError, norm_file.name, "does not exist")


def test_a_link_out_of_the_model_is_refused(refused, norm_file, tmp_path):
    target = norm_file.rename(tmp_path / "elsewhere.safetensors")
    norm_file.symlink_to(target)
    refused(ModelError, str(norm_file), "outside the model's directory")


def test_a_link_out_is_refused_with_its_target_and_ways_that_work(
    refused, model, norm_file, tmp_path
):
    store = tmp_path / "store"
    store.mkdir()
    target = norm_file.rename(store / "weights.safetensors")
    norm_file.symlink_to(target)
    said = refused(ModelError, str(norm_file), str(target), "copy the file into that directory")
    assert f"--model-store {store} " in said
    assert attempt(model, tmp_path / "run", model_store=str(store)).config.model_store == str(store)
    norm_file.unlink()
    shutil.copy(target, norm_file)
    assert attempt(model, tmp_path / "run").config.model_store == ""


def test_a_store_that_is_reached_by_a_link_is_a_store(model, norm_file, tmp_path, monkeypatch):
    store = tmp_path / "disk" / "store"
    store.mkdir(parents=True)
    (tmp_path / "mount").symlink_to(tmp_path / "disk")
    norm_file.rename(store / "weights.safetensors")
    norm_file.symlink_to(tmp_path / "mount" / "store" / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    found = attempt(model, tmp_path / "run", model_store="mount/store").config.model_store
    assert found == str(store), "what workers are told is absolute"


@pytest.mark.parametrize("secret", ["config.json", "tokenizer.json"])
def test_a_store_allows_no_links_to_anywhere_else(refused, model, norm_file, tmp_path, secret):
    store = tmp_path / "store"
    store.mkdir()
    norm_file.symlink_to(norm_file.rename(store / "weights.safetensors"))
    shutil.copy(model / "config.json", tmp_path / "store-of-others")
    (model / secret).unlink(missing_ok=True)
    (model / secret).symlink_to(tmp_path / "store-of-others")
    refused(ModelError, secret, "outside the model's directory", model_store=str(store))


@pytest.mark.parametrize(
    "store", ["nowhere", "~nobody-there/x", "a\0b", "model.safetensors.index.json"]
)
def test_a_store_that_is_no_directory_is_refused(refused, model, monkeypatch, store):
    monkeypatch.chdir(model)
    refused(ConfigError, "model_store: ", "no such directory", model_store=store)


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_that_link_to_what_this_machine_lacks_are_refused_as_that(
    refused, model, tmp_path, file
):
    (model / "model.safetensors.index.json").unlink()
    (model / file).symlink_to(tmp_path / "store" / "w.safetensors")
    (tmp_path / "store").mkdir()
    said = f"is a link to {str(tmp_path / 'store' / 'w.safetensors')!r}, which does not exist on"
    refused(ModelError, file, said, "every machine", model_store=str(tmp_path / "store"))


def test_a_link_out_by_way_of_a_link_is_refused(refused, norm_file, tmp_path):
    target = norm_file.rename(tmp_path / "elsewhere.safetensors")
    (norm_file.parent / "inner").symlink_to(target)
    norm_file.symlink_to("inner")
    refused(ModelError, str(norm_file), "outside the model's directory")


def test_a_link_in_a_circle_is_refused(refused, norm_file):
    norm_file.unlink()
    norm_file.symlink_to(norm_file.name)
    refused(ModelError, norm_file.name, "does not exist")


def test_a_link_to_nothing_is_refused(refused, norm_file):
    norm_file.unlink()
    norm_file.symlink_to("nothing.safetensors")
    refused(ModelError, norm_file.name, "does not exist")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"]
)
def test_a_link_to_a_secret_is_refused_before_it_is_copied_into_a_result(
    refused, model, tmp_path, name
):
    secret = tmp_path / "credentials"
    secret.write_text('{"key": "AKIA"}')
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    assert "AKIA" not in refused(ModelError, str(model / name), "outside the model's directory")


def test_links_inside_the_model_are_followed(model, norm_file, tmp_path):
    target = norm_file.rename(model / "renamed.safetensors")
    norm_file.symlink_to(target.name)
    assert attempt(model, tmp_path / "run").source_bytes > 0


def test_the_links_of_a_hub_cache_are_followed(model, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    shutil.copytree(model, snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.glob("*.*"))):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert attempt(snapshot, tmp_path / "run").source_bytes > 0


@pytest.fixture
def blobs(tmp_path, monkeypatch):
    """The files of a repository in a cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--name" / "blobs"
    folder.mkdir(parents=True)
    return folder


def test_a_folder_that_was_downloaded_as_links_into_the_hub_cache_is_read(
    model, norm_file, blobs, tmp_path
):
    norm_file.symlink_to(norm_file.rename(blobs / "0123abcd"))
    assert attempt(model, tmp_path / "run").source_bytes > 0


@pytest.mark.usefixtures("blobs")
@pytest.mark.parametrize(
    "name", ["token", "models--org--name/refs/main", "datasets--a--b/blobs/01"]
)
def test_what_is_no_model_file_of_the_hub_cache_is_not_read(refused, norm_file, tmp_path, name):
    target = tmp_path / "hub" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    norm_file.symlink_to(norm_file.rename(target))
    refused(ModelError, str(norm_file), "outside the model's directory")


def test_a_cache_file_is_not_read_by_who_cannot_name_its_hash(refused, norm_file, blobs):
    snapshot = blobs.parent / "snapshots" / "01"
    snapshot.mkdir(parents=True)
    (snapshot / "w.safetensors").symlink_to(norm_file.rename(blobs / "0123abcd"))
    norm_file.symlink_to(snapshot / "w.safetensors")
    refused(ModelError, str(norm_file), "outside the model's directory")


def test_a_cache_link_out_of_the_cache_is_refused(model, tmp_path):
    snapshot = shutil.copytree(model, tmp_path / "cache" / "snapshots" / "0123")
    target = (snapshot / "config.json").rename(tmp_path / "config.json")
    (snapshot / "config.json").symlink_to(target)
    refusal(
        ModelError, lambda: attempt(snapshot, tmp_path / "run"), "outside the model's directory"
    )


def test_a_single_file_comes_before_an_index_as_in_transformers(model, sound, tmp_path):
    whole = save_model(tmp_path / "whole", seed=1)
    shutil.copy(whole / "model.safetensors", model)
    (model / "model.safetensors.index.json").write_text("not read")
    found = attempt(model, tmp_path / "run").revision
    assert found == attempt(whole, tmp_path / "run").revision
    assert found != attempt(sound, tmp_path / "run").revision
