"""Runs that quantise: what users load is what was measured, and no worker changes a bit of it."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from actors.layer_units import corrected_rounding
from actors.messages import VerifyRequest
from actors.numerics.least_squares import least_squares_step
from actors.numerics.rounding import factor_of
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.quantised import KEY, schemes_in
from actors.storage.records import read_records
from actors.worker.evaluator import Evaluator
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.prepare.standalone_evaluation import prepare_evaluation
from orchestrator.recipe.reading import load_config
from planners.errors import ModelError
from planners.model.cost import model_bytes
from planners.model.form import model_form_from_json
from planners.model.scheme import Scheme
from tests.builders import (
    compress_local,
    layer_file,
    logits_of,
    prepared_run,
    result_files,
    run_local,
    save_model,
)
from tests.orchestrator.test_failures import FailingExecutor

GPTQ = {"method": "gptq", "options": {"bits": 4, "group": 16}}
HULL = {
    "method": "modegpt",
    "keep_bytes": "21kB",
    "options": {"refit": True, "schemes": "3/16,4/16,8/32", "multiple_of": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, intermediate_size=64, attention_bias=True)


@pytest.fixture(scope="module", params=[GPTQ, HULL], ids=["gptq", "hull"])
def finished(request, model, tmp_path_factory):
    """Return a recipe, the run of it, and its report."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return request.param, out, run_local(model, out, **request.param)


@pytest.fixture(scope="module")
def rounded(model, tmp_path_factory):
    """Return a run of GPTQ whose driver dies before it verifies."""
    out = tmp_path_factory.mktemp("rounded") / "run"
    compress_local(model, out, **GPTQ)
    return out


@pytest.fixture(scope="module")
def corrected(model, tmp_path_factory):
    """Return a run of both passes whose driver dies before it verifies."""
    out = tmp_path_factory.mktemp("corrected") / "run"
    compress_local(model, out, **HULL)
    return out


def config_of(out):
    return json.loads((out / "model" / "config.json").read_text())


def bytes_in(folder):
    tensors = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return sum(tensor.nbytes for each in tensors for tensor in each.values())


@pytest.mark.slow
def test_plain_transformers_gives_the_perplexity_of_the_report(model, finished):
    recipe, out, report = finished
    assert report["verify"]["passed"]
    assert report["verdict"] == "READY"
    ids = load_file(model / "tokens" / "evaluation.safetensors")["input_ids"]
    ours = "auto_map" in config_of(out)
    assert ours == (recipe is HULL)
    logits = logits_of(out / "model", ids, trust_remote_code=ours)
    nats = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    said = report["evaluation"]["compressed"]["perplexity"]
    assert math.exp(float(nats)) == pytest.approx(said, rel=1e-5)


@pytest.mark.slow
def test_the_file_has_the_bytes_and_the_schemes_that_were_planned(model, finished):
    recipe, out, _ = finished
    schemes = schemes_in(config_of(out))
    if recipe is HULL:
        form = json.loads((out / "allocation.json").read_text())["form"]
        planned = model_bytes(Checkpoint(str(model)).shape, model_form_from_json(form))
        assert bytes_in(out / "model") == planned <= 21_000
        assert {each.bits for each in schemes.values()} == {3, 4, 8}
        assert {layer["intermediate"] for layer in form["layers"]} == {48, 64}
        return
    assert bytes_in(out / "model") == prepared_run(model, out, **recipe).plan.bytes_after
    assert {*schemes.values()} == {Scheme(bits=4, group=16)}
    assert len(schemes) == 7 * 3


@pytest.mark.slow
def test_what_was_quantised_here_is_read_for_evaluation_and_not_compressed_again(model, finished):
    _, out, _ = finished
    tokens = f"tokens:{model}/tokens/evaluation.safetensors"
    overrides = {"model": str(out / "model"), "device": "cpu", "evaluation.source": tokens}
    assert len(prepare_evaluation(load_config(None, overrides)).ids) == 7
    with pytest.raises(ModelError, match="already"):
        prepared_run(model, out / "again", source=out / "model", **GPTQ)


def tensors_in(out):
    """Return what the records of a run say of the tensors of its result."""
    records = read_records(Directory(str(out))).values()
    return {name: facts for record in records
            for name, facts in record.values.get("tensors", {}).items()}  # fmt: skip


@pytest.fixture
def written(rounded, tmp_path):
    """Return a folder with the result of GPTQ that may be changed."""
    return shutil.copytree(rounded / "model", tmp_path / "model")


def failed_checks(folder, rounded, *, planned=True):
    """Return the checks of a result that fail, given what was computed, and planned."""
    schemes = schemes_in(config_of(rounded)) if planned else None
    request = VerifyRequest(
        uri=str(folder), family="llama", tensors=tensors_in(rounded), ids=[[1, 5, 9, 2]] * 2,
        whole=True, schemes=schemes,
    )  # fmt: skip
    checks = Evaluator(1, "cpu").verify("verify", request).values["checks"]
    return {check["name"] for check in checks if not check["passed"]}


def test_a_result_as_it_was_written_passes(written, rounded):
    assert failed_checks(written, rounded) == set()


@pytest.mark.parametrize("part", ["weight_scale", "weight_packed"])
def test_one_scale_or_integer_that_was_tampered_with_is_found(written, rounded, part):
    path, name = layer_file(written, 1), f"model.layers.1.mlp.up_proj.{part}"
    tensors = load_file(path)
    changed = tensors[name].clone()
    changed[3, 1] = changed[3, 1] * 1.25 if part == "weight_scale" else changed[3, 1] ^ 1
    save_file({**tensors, name: changed}, path, metadata={"format": "pt"})
    assert "every tensor as computed" in failed_checks(written, rounded)


@pytest.mark.parametrize("change", [{"group_size": 32}, {"num_bits": 8}, {"symmetric": False}])
def test_a_config_of_another_scheme_is_found(written, rounded, change):
    path = written / "config.json"
    config = json.loads(path.read_text())
    for group in config[KEY]["config_groups"].values():
        group["weights"] |= change
    path.write_text(json.dumps(config))
    assert failed_checks(written, rounded) == {"bits and groups as planned"}
    assert failed_checks(written, rounded, planned=False) == {"bits and groups as planned"}


def test_a_matrix_that_a_config_leaves_out_is_found(written, rounded):
    path = written / "config.json"
    config = json.loads(path.read_text())
    config[KEY]["config_groups"]["group_0"]["targets"].pop()
    path.write_text(json.dumps(config))
    assert failed_checks(written, rounded) == {"bits and groups as planned"}
    assert failed_checks(written, rounded, planned=False) == {"bits and groups as planned"}


@pytest.mark.parametrize("unit", ["layer-00001", None])
def test_a_worker_that_is_lost_while_it_rounds_changes_no_byte(model, rounded, tmp_path, unit):
    lost = WorkerLost(FailureClass.WORKER_CRASHED, "gone")
    executor = FailingExecutor(unit or "none", lost, times=1)
    compress_local(model, tmp_path / "run", executor=executor, workers=2, **GPTQ)
    assert executor.left == (0 if unit else 1)
    assert result_files(tmp_path / "run") == result_files(rounded)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["damage-layer-00001", "refit-layer-00001"])
def test_a_worker_that_is_lost_as_it_measures_or_corrects_changes_no_byte(
    model, corrected, tmp_path, unit
):
    names = read_records(Directory(str(corrected))).keys()
    assert unit in names
    lost = WorkerLost(FailureClass.WORKER_CRASHED, "gone")
    executor = FailingExecutor(unit, lost, times=1)
    compress_local(model, tmp_path / "run", executor=executor, workers=2, **HULL)
    assert executor.left == 0
    assert result_files(tmp_path / "run") == result_files(corrected)


@pytest.mark.parametrize("unit", ["draft-layer-00001", "refit-layer-00001", "refit-losses"])
def test_a_corrected_pass_that_is_resumed_gives_the_same_bytes(model, corrected, unit):
    before = result_files(corrected)
    (corrected / "records" / f"{unit}.json").unlink()
    compress_local(model, corrected, **HULL)
    assert (corrected / "records" / f"{unit}.json").exists()
    assert result_files(corrected) == before


def test_every_factor_of_the_corrected_pass_that_was_damped_is_in_its_record(
    model, corrected, tmp_path, monkeypatch
):
    out = shutil.copytree(corrected, tmp_path / "run")
    (out / "records" / "refit-layer-00001.json").unlink()
    seen = []

    def damped_step(sums, *, damping, where):
        seen.append(f"damped for {where}")
        return least_squares_step(sums, damping=damping, where=where)[0], seen[-1]

    def damped_factor(gram, *, where):
        seen.append(f"damped for {where}")
        return replace(factor_of(gram, where=where), rung=seen[-1])

    monkeypatch.setattr(corrected_rounding, "least_squares_step", damped_step)
    monkeypatch.setattr(corrected_rounding, "factor_of", damped_factor)
    compress_local(model, out, **HULL)
    records = read_records(Directory(str(out)))
    layers = [records[f"refit-layer-{layer:05d}"].values["linears"] for layer in range(3)]
    halves = [half for linears in layers for half in linears.values()]
    assert sorted(rung for half in halves for rung in half["rungs"]) == sorted(seen)
    assert {"damped for o_proj", "damped for correction of down_proj"} < {*seen}
    assert result_files(out) == result_files(corrected)


def test_the_corrected_pass_rounds_every_linear_again_on_what_is_left_of_its_inputs(corrected):
    schemes = schemes_in(config_of(corrected))
    for layer in range(3):
        draft, new = (
            load_file(corrected / folder / f"layer-{layer:05d}.safetensors")
            for folder in ("draft", "refit")
        )
        assert draft.keys() == new.keys()
        for name in draft:
            module, _, part = name.rpartition(".")
            assert draft[name].shape == new[name].shape
            if module not in schemes or part == "weight_shape":
                assert torch.equal(draft[name], new[name]), name
        packed = [n for n in draft if n.endswith("weight_packed")]
        differ = {n for n in packed if not torch.equal(draft[n], new[n])}
        assert len(differ) >= len(packed) - 3 * (layer == 0)  # the first reads the input itself
    values = read_records(Directory(str(corrected)))["refit-layer-00001"].values
    assert values["linears"].keys() == {"o_proj", "down_proj"}
    for found in values["linears"].values():
        assert 0 < found["rest_after"] < found["rest_before"]
