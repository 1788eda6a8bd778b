"""Several methods in one run beside what else a run can do: each works behind a step, too."""

import io
import json
from dataclasses import replace

import pytest
import torch
import yaml
from rich.console import Console

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_records
from actors.storage.tensors import read_tensors
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli.plan import show
from orchestrator.experiments import batch as batches
from orchestrator.experiments.batch import do_batch
from orchestrator.experiments.batch_file import read_batch
from orchestrator.experiments.redo import redo
from orchestrator.forecast.forecast import forecast, forecast_of
from orchestrator.forecast.pricing import Pricing, parse_cluster
from orchestrator.phases.open_run import open_run, recipe_of
from orchestrator.recipe.reading import load_config
from orchestrator.run import run_on
from planners.budget.widths import cut_layer, layer_widths
from planners.errors import ConfigError, PlanError
from planners.model.cost import dense_model_form
from planners.model.form import model_form_from_json
from tests.builders import (
    LENGTH,
    compress_local,
    layer_file,
    logits_of,
    prepared_run,
    result_files,
    save_model,
)
from tests.by_hand import dense_model, step_by_hand

MODEGPT = {"method": "modegpt", "keep_fraction": 0.9,
           "options": {"modules": "mlp,vo", "allocation": "uniform"}}  # fmt: skip
SLICE = {"method": "slicegpt", "slice": 0.25, "options": {}}
QK = {"method": "svdllm", "keep_fraction": 0.95, "options": {"modules": "q_proj,k_proj"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), model_type="qwen2")


def records_of(folder):
    return read_records(Directory(str(folder)))


def form_of(folder):
    return model_form_from_json(records_of(folder)["step"].values["form"])


def some_ids():
    return torch.randint(0, 61, (3, LENGTH), generator=torch.Generator().manual_seed(2))


def test_damage_as_a_rise_of_the_loss_is_that_of_the_model_the_step_began_with(model, tmp_path):
    options = {"modules": "mlp,vo", "damage": "loss", "grid": "0.5", "probe_tokens": 4 * LENGTH}
    second = {"method": "modegpt", "keep_fraction": 0.7, "options": options}
    compress_local(model, tmp_path, steps=[SLICE, second])
    ids = read_tensors(Directory(str(model / "tokens")), "calibration.safetensors")["input_ids"]
    start = form_of(tmp_path / "steps/1-slicegpt")
    dense = dense_model_form(Checkpoint(str(model)).shape)
    sliced, _ = step_by_hand(dense_model(model), model, SLICE, start=dense, form=start, ids=ids)

    def loss(found):
        logits = found(ids[:4]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:4, 1:].flatten())

    for index, module in ((0, "mlp"), (1, "vo")):
        curve = records_of(tmp_path)[f"damage-layer-{index:05d}"].values["curves"][module]
        width, damage = curve[1]
        layers = list(start.layers)
        layers[index] = cut_layer(layers[index], layer_widths(layers[index]) | {module: width})
        form = replace(start, layers=tuple(layers))
        cut, _ = step_by_hand(sliced, model, second, start=start, form=form, ids=ids)
        with torch.inference_mode():
            assert damage == pytest.approx(float(loss(cut) - loss(sliced)), rel=1e-2, abs=1e-5)


def test_a_sequential_step_of_full_width_changes_nothing_behind_another(model, tmp_path):
    same = {"method": "slicegpt", "slice": 0.0, "options": {"schedule": "sequential"}}
    compress_local(model, tmp_path / "two", steps=[MODEGPT, same])
    compress_local(model, tmp_path / "one", **MODEGPT)
    one, two = (
        logits_of(tmp_path / name / "model", some_ids(), trust_remote_code=True)
        for name in ("one", "two")
    )
    assert (one - two).abs().max() < 1e-4


def test_shards_of_a_sequential_step_pass_it_on_any_number_of_workers(model, tmp_path):
    sequential = {**SLICE, "options": {"schedule": "sequential", "shards": 2}}
    for workers in (1, 3):
        compress_local(model, tmp_path / str(workers), steps=[QK, sequential], workers=workers)
    assert result_files(tmp_path / "1") == result_files(tmp_path / "3")
    assert not [p for p in (tmp_path / "1/boundary").glob("*") if p.suffix == ".safetensors"]


def test_turned_statistics_are_stored_as_the_recipe_says(model, tmp_path):
    whole = {**SLICE, "slice": 0.0}
    steps = [whole, {**MODEGPT, "keep_fraction": 0.8}]
    found = {}
    for dtype in ("float64", "float32"):
        out = tmp_path / dtype
        compress_local(model, out, steps=steps, statistics_dtype=dtype, keep_statistics=True)
        found[dtype] = read_tensors(Directory(str(out)), "stats/layer-00001.safetensors")
    for name, total in found["float64"].items():
        other = found["float32"][name]
        assert other.dtype == (torch.float32 if total.ndim == 1 and "gram" in name else total.dtype)
        assert (total - other).double().norm() <= 1e-6 * total.double().norm()


def test_a_wrong_byte_in_the_result_is_put_right_though_its_steps_are_gone(model, tmp_path):
    compress_local(model, tmp_path, steps=[MODEGPT, SLICE])
    whole = result_files(tmp_path)
    path = layer_file(tmp_path / "model", 1)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    compress_local(model, tmp_path, steps=[MODEGPT, SLICE])
    assert result_files(tmp_path) == whole


def test_a_result_whose_statistics_are_gone_too_needs_no_step_again(model, tmp_path):
    compress_local(model, tmp_path, steps=[MODEGPT, SLICE])
    for folder in ("stats", "basis"):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
    seen = []
    compress_local(model, tmp_path, steps=[MODEGPT, SLICE], listener=seen.append)
    assert not {event["kind"] for event in seen} & {"calibrate", "basis", "layer"}


def test_a_forecast_of_several_steps_is_that_of_all_of_them():
    recipe = {"model": "llama-2-70b", "calibration.sequences": 16, "evaluation.sequences": 16}
    devices = parse_cluster("8xA100-80GB")
    steps = [MODEGPT, {**SLICE, "keep_fraction": 0.7, "slice": None}]
    both = forecast(load_config(None, {**recipe, "steps": steps}), devices, Pricing())
    alone = [
        forecast(
            load_config(None, {**recipe, **{k: v for k, v in one.items() if v is not None}}),
            devices,
            Pricing(),
        )
        for one in steps
    ]
    said = both.to_json()
    assert json.loads(json.dumps(said)) == said
    assert [job.spec.name for job in both.steps] == ["modegpt", "slicegpt"]
    assert both.plan.keep_fraction <= 0.7
    # Two calibrations, both compressions, but the dense model is evaluated once and smaller things
    # take less: more than either, less than both one after the other.
    longest = max(one.outlook.seconds.p50 for one in alone)
    assert longest < both.outlook.seconds.p50 < sum(one.outlook.seconds.p50 for one in alone)
    assert said["flops"]["calibrate"] > 1.5 * alone[0].to_json()["flops"]["calibrate"]
    assert said["transfer_bytes"] == 7 * 4 * 16 * 2048 * 8192 * 2
    console = Console(width=80, record=True, file=io.StringIO())
    show(console, both, title="two", out="not started")
    text = console.export_text()
    assert "step 1, modegpt" in text
    assert "step 2, slicegpt" in text


BY_TYPE = {"method": "svdllm", "keep_fraction": 0.85,
           "options": {"modules": "q_proj,k_proj", "allocation": "by_type"}}  # fmt: skip
LOSS = {"method": "modegpt", "keep_fraction": 0.8, "options": {"modules": "mlp", "damage": "loss"}}
REFIT = {"method": "modegpt", "keep_fraction": 0.8, "options": {"modules": "mlp", "refit": True}}
SEQUENTIAL = {**SLICE, "options": {"schedule": "sequential"}}


@pytest.mark.parametrize(
    ("first", "second"),
    [(MODEGPT, BY_TYPE), (SLICE, LOSS), ({**SLICE, "slice": 0.0}, LOSS), (QK, REFIT),
     (QK, SEQUENTIAL)],
)  # fmt: skip
def test_every_kind_of_step_can_be_forecast_behind_another(model, tmp_path, first, second):
    prepared = prepared_run(model, tmp_path / "out", steps=[first, second])
    found = forecast_of(prepared, Pricing(price_per_hour=1.0))
    assert found.outlook.money.p50 > 0
    assert found.job.carried == prepared.former[-1].carries == (first.get("slice") == 0.0)
    assert found.worker_bytes >= prepared.plan.worker_bytes
    assert {"calibrate", "compress", "evaluate"} <= found.outlook.phases.keys()
    assert ("allocate" in found.outlook.phases) == (second != SEQUENTIAL)
    assert ("refit" in found.outlook.phases) == (second == REFIT)


def test_a_step_that_does_not_fit_is_named_with_what_would():
    given = {"model": "llama-2-70b", "steps": [MODEGPT, {**SLICE, "keep_fraction": 0.8,
                                                        "slice": None}]}  # fmt: skip
    with pytest.raises(PlanError, match=r"^steps\[0\]: a worker of") as caught:
        forecast(load_config(None, given), parse_cluster("8xT4-8GB"), Pricing())
    assert "--worker-gib" in caught.value.hint
    assert "--option" not in caught.value.hint


@pytest.mark.slow
def test_a_batch_takes_entries_of_several_steps(model, tmp_path, monkeypatch):
    def run_here(prepared, *, listener, **_):
        open_run(prepared)
        return run_on(prepared, LocalExecutor(), listener=listener)

    monkeypatch.setattr(batches, "run", run_here)
    tokens = f"tokens:{model}/tokens"
    common = {
        "model": str(model),
        "device": "cpu",
        "method": "modegpt",
        "keep_fraction": 0.8,
        "calibration": {"source": f"{tokens}/calibration.safetensors"},
        "evaluation": {"source": f"{tokens}/evaluation.safetensors"},
    }
    document = {"out": str(tmp_path / "out"), "defaults": common,
                "runs": [{"steps": [MODEGPT, SLICE]}, {"keep_fraction": 0.7}]}  # fmt: skip
    path = tmp_path / "batch.yaml"
    path.write_text(yaml.safe_dump(document))
    rows = do_batch(read_batch(str(path)), listener=lambda _: None, on_run=lambda _: None)
    assert [(row.state, row.calibration) for row in rows] == [("READY", "own")] * 2
    assert rows[0].name.endswith("modegpt-keep0.9-slicegpt-slice0.25")


def test_layers_of_several_steps_have_no_options_of_their_own(model, tmp_path):
    steps = [MODEGPT, SLICE]
    with pytest.raises(ConfigError, match=r"^layer_options: cannot be given with steps"):
        load_config(None, {"steps": steps, "layer_options": {1: {"ridge": 0.5}}})
    open_run(prepared_run(model, tmp_path, steps=steps))
    config = recipe_of(Directory(str(tmp_path)))
    with pytest.raises(ConfigError, match="several steps"):
        redo(config, [1], {"ridge": "0.5"}, listener=lambda _: None)
