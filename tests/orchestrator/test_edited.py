"""A model that is edited in place is another model: nothing of the old one is mixed with it."""

import json
import shutil
import struct

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from actors.storage.contents import TAKEN_OVER
from actors.storage.files import Directory
from orchestrator.backend.local import LocalExecutor
from orchestrator.experiments.batch_file import read_batch
from orchestrator.experiments.sweep import Wanted, points_of, sweep_on
from orchestrator.phases.open_run import check_run, write_plan
from orchestrator.run import run, run_on
from planners.errors import ConfigError, ModelError, StorageError
from tests.builders import (
    DeadDriverError,
    DyingDriver,
    compress_local,
    prepared_run,
    result_files,
    run_local,
    save_model,
)

UP = "model.layers.1.mlp.up_proj.weight"
UNIFORM = {"method": "modegpt", "keep_fraction": 0.8, "options": {"allocation": "uniform"}}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def finished(original, tmp_path_factory):
    """Return a run up to its verification, with its statistics, of a model that is not edited."""
    out = tmp_path_factory.mktemp("finished")
    compress_local(original, out, **UNIFORM)
    return out


@pytest.fixture
def model(original):
    """Give the model, to be edited; what it was is put back behind the test."""
    kept = {path: path.read_bytes() for path in original.iterdir() if path.is_file()}
    yield original
    for path in original.iterdir():
        if path.is_file() and path not in kept:
            path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)


def edited(model, name=UP):
    """Multiply a tensor by four, in place."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    part = memoryview(data)[8 + length + begin : 8 + length + end]
    torch.frombuffer(part, dtype=torch.float32).mul_(4)
    with path.open("r+b") as file:
        file.write(data)


def ignore(event):
    del event


def test_the_same_command_on_an_edited_model_names_the_tensor(model, finished):
    assert check_run(prepared_run(model, finished, **UNIFORM))
    edited(model)
    edited(model, "model.norm.weight")
    words = (
        rf"holds a different run: tensor {UP} of the model changed, and 1 more; model revision was"
    )
    with pytest.raises(ConfigError, match=words):
        run(prepared_run(model, finished, **UNIFORM), listener=ignore)


def test_so_it_does_behind_a_driver_that_died_and_goes_on_once_it_is_put_back(
    model, finished, tmp_path
):
    file = model / "model.safetensors"
    before = file.read_bytes()
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, listener=DyingDriver("statistics", 2), **UNIFORM)
    edited(model, "lm_head.weight")
    with pytest.raises(ConfigError, match=r"tensor lm_head\.weight of the model changed"):
        compress_local(model, tmp_path, **UNIFORM)
    file.write_bytes(before)
    compress_local(model, tmp_path, **UNIFORM)
    assert result_files(tmp_path) == result_files(finished)


# The moment of the edit, and what is read of the model after it.
DURING = [
    ("phase begins", "calibrate", UP),
    ("phase begins", "evaluate", "model.norm.weight"),
    ("phase begins", "compress", "model.layers.2.self_attn.k_proj.weight"),
    ("phase begins", "compress", "model.embed_tokens.weight"),
    ("phase begins", "compress", "lm_head.weight"),
]


@pytest.mark.parametrize(("kind", "unit", "name"), DURING)
def test_a_worker_that_reads_another_tensor_than_the_run_began_with_says_so(
    model, tmp_path, kind, unit, name
):
    file = model / "model.safetensors"
    before = file.read_bytes()

    def edit(event):
        if event["kind"] == kind and event["unit"] == unit:
            edited(model, name)

    with pytest.raises(
        ModelError, match=rf"model\.safetensors: tensor {name} changed since this run started"
    ):
        compress_local(model, tmp_path, listener=edit, **UNIFORM)
    file.write_bytes(before)
    prepared_run(model, tmp_path, **UNIFORM)


def test_statistics_of_the_model_as_it_was_are_refused(model, finished, tmp_path):
    given = {**UNIFORM, "keep_fraction": 0.7, "stats": str(finished)}
    assert not check_run(prepared_run(model, tmp_path, **given))
    edited(model)
    words = (
        rf"stats: .* cannot be used for this run: tensor {UP} of the model changed; "
        "model revision is"
    )
    with pytest.raises(ConfigError, match=words):
        check_run(prepared_run(model, tmp_path, **given))


def spoiled(out, name):
    """Change a bit of a sum in place; its size is as it was."""
    path = out / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_kept_statistics_that_are_edited_serve_no_other_run_and_are_made_again_where_asked(
    model, finished, tmp_path
):
    kept = shutil.copytree(finished, tmp_path / "kept")
    name = "stats/layer-00001.safetensors"
    spoiled(kept, name)
    given = {**UNIFORM, "stats": str(kept)}
    words = rf"{name}: does not match the hash in its record"
    with pytest.raises(StorageError, match=words):
        compress_local(model, tmp_path / "out", **given)
    prepared = prepared_run(model, tmp_path / "out", **given)
    with pytest.raises(DeadDriverError):
        run_on(prepared, LocalExecutor(), verify_hashes=True,
               listener=DyingDriver("phase begins", 1, unit="verify"))  # fmt: skip
    assert result_files(tmp_path / "out") == result_files(finished)


def test_a_basis_that_is_edited_between_two_drivers_is_refused(model, tmp_path):
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, listener=DyingDriver("phase begins", 1, unit="stitch"))
    spoiled(tmp_path, "basis/basis-site-00002.safetensors")
    (tmp_path / "records" / "layer-00001.json").unlink()
    with pytest.raises(
        StorageError, match=r"basis-site-00002.*: does not match the hash in its record"
    ):
        compress_local(model, tmp_path)


def test_a_sweep_and_its_points_are_of_the_model_as_it_was(model, finished):
    edited(model)
    base = prepared_run(model, finished, **UNIFORM)
    points = points_of(
        base,
        Wanted(
            names=["modegpt"], sizes=[("keep_fraction", 0.9)], options={"allocation": "uniform"}
        ),
    )
    with pytest.raises(
        ConfigError, match=f"holds a different run: tensor {UP} of the model changed"
    ):
        sweep_on(base, points, LocalExecutor(), listener=ignore)
    with pytest.raises(ConfigError, match=f"stats: .*: tensor {UP} of the model changed"):
        check_run(points[0])  # as export does


def test_a_batch_refuses_what_it_did_with_the_model_as_it_was(model, tmp_path):
    tokens = {
        split: {"source": f"tokens:{model}/tokens/{split}.safetensors"}
        for split in ("calibration", "evaluation")
    }
    entry = {"model": str(model), "device": "cpu", "slice": 0.25, "out": "one", **tokens}
    path = tmp_path / "batch.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "runs": [entry]}))
    (whole,) = read_batch(str(path)).entries
    write_plan(whole.prepared)
    (again,) = read_batch(str(path)).entries
    assert check_run(again.prepared)
    edited(model)
    with pytest.raises(
        ConfigError, match=rf"runs, entry 1: .*one holds a different run: tensor {UP}"
    ):
        read_batch(str(path))


@pytest.mark.parametrize("name", TAKEN_OVER[::4])
def test_a_tokenizer_that_is_edited_makes_another_run_and_leaves_statistics_good(
    model, finished, tmp_path, name
):
    given = {**UNIFORM, "stats": str(finished)}
    (model / name).write_text("{}\n" if name.endswith(".json") else "new")
    with pytest.raises(ConfigError, match="holds a different run: tokenizer files was"):
        check_run(prepared_run(model, finished, **UNIFORM))
    assert not check_run(prepared_run(model, tmp_path, **given))


def test_a_tokenizer_that_is_edited_during_a_run_does_not_come_into_its_result(model, tmp_path):
    def edit(event):
        if event["kind"] == "phase begins" and event["unit"] == "stitch":
            (model / "generation_config.json").write_text('{"temperature": 2}')

    with pytest.raises(ModelError, match=r"the tokenizer or generation_config\.json has changed"):
        compress_local(model, tmp_path, listener=edit, **UNIFORM)


def test_a_model_on_a_store_that_is_overwritten_is_another(model, tmp_path, s3):
    uri = s3("model")
    store = Directory(uri)

    def put():
        for path in model.iterdir():
            if path.is_file():
                store.write(path.name, path.read_bytes())

    put()
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, source=uri, listener=DyingDriver("statistics", 1), **UNIFORM)
    edited(model)
    put()
    with pytest.raises(ConfigError, match=f"tensor {UP} of the model changed"):
        compress_local(model, tmp_path, source=uri, **UNIFORM)


def test_the_same_tensors_in_other_files_are_the_same_model(model, finished):
    file = model / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    halves = {"a": names[::2], "b": names[1::2]}
    for half, mine in halves.items():
        save_file({name: tensors[name] for name in mine}, model / f"{half}.safetensors")
    where = {name: f"{half}.safetensors" for half, mine in halves.items() for name in mine}
    file.unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert check_run(prepared_run(model, finished, **UNIFORM))
