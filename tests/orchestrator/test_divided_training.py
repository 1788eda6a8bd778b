"""Runs that train a model too large for one worker: two divide its layers, to the same bytes."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.sources import embedded_model
from orchestrator.backend import ray_cluster
from orchestrator.backend.ray_executor import RayExecutor
from planners.errors import PlanError
from planners.memory.peaks import LIBRARIES
from planners.memory.training import model_parts
from tests.builders import compress_local, prepared_run, result_files

LENGTH = 64
RECIPE = {
    "method": "modegpt",
    "keep_fraction": 0.6,
    "options": {"allocation": "uniform"},
    "recover": {"mode": "global", "trains": "all", "batch": 2, "tokens": 8 * 2 * LENGTH,
                "held_out": 8, "learning_rates": [0.005]},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the trained model that comes with the package, with a little text."""
    folder, tiny = tmp_path_factory.mktemp("model"), embedded_model()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, folder / name)
    (folder / "tokens").mkdir()
    for split, count in (("calibration", 40), ("evaluation", 8)):
        ids = load_file(tiny / f"{split}.safetensors")["input_ids"][:count, :LENGTH]
        save_file({"input_ids": ids.contiguous()}, folder / "tokens" / f"{split}.safetensors")
    return folder


def gib(model, out, *, workers):
    """Return the memory of a worker with which so many are needed."""
    prepared = prepared_run(model, out, **RECIPE)
    plan, how, dtype = prepared.plan, prepared.recovery, prepared.identity.batching.dtype
    own = model_parts(plan.shape, plan.form, plan.shape, how, dtype=dtype, workers=workers)
    return (sum(own.values()) + LIBRARIES) / 2**30


@pytest.mark.ray
@pytest.mark.nightly
def test_two_workers_train_what_does_not_fit_one(model, tmp_path):
    compress_local(model, tmp_path / "whole", **RECIPE)
    with ray_cluster.connected("local", num_cpus=2, num_gpus=0, store_bytes=0):
        how = {**RECIPE, "workers": 2, "worker_gib": gib(model, tmp_path / "asked", workers=2)}
        assert prepared_run(model, tmp_path / "looked at", **how).plan.training_workers == 2
        compress_local(model, tmp_path / "divided", **how, executor=RayExecutor())
    assert result_files(tmp_path / "divided") == result_files(tmp_path / "whole")
    choice = read_record(Directory(str(tmp_path / "divided")), "recover-choice")
    assert choice.values["used"]


def test_a_single_worker_that_cannot_hold_it_is_told_what_could(model, tmp_path):
    small = gib(model, tmp_path / "asked", workers=2)
    with pytest.raises(PlanError, match="too small to train the whole model") as caught:
        prepared_run(model, tmp_path / "run", **RECIPE, worker_gib=small)
    assert "--workers 2, with recover.parts 2 and a recover.batch of 2" in caught.value.hint
