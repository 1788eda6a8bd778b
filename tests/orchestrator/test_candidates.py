"""Methods that compete for the modules of a layer, in whole runs: known answers, and same bytes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.backend.local import LocalExecutor
from orchestrator.experiments.sweep import Wanted, points_of, sweep_on
from orchestrator.phases.open_run import open_run
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from orchestrator.report import render_page
from orchestrator.run import run_on
from planners.errors import ConfigError, PlanError
from tests.builders import (
    DeadDriverError,
    compress_local,
    logits_of,
    perplexity,
    prepared_run,
    result_files,
    run_local,
    save_model,
)

BOTH = {"candidates": "modegpt,svdllm", "probe_tokens": 200, "grid": "0.75,0.5,0.25"}
RECIPE = {"method": "modegpt", "keep_fraction": 0.65, "options": BOTH}
LAYERS = 3
RANKS = {"q_proj": 6, "k_proj": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return redundant_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return out, run_local(model, out, **RECIPE)


def makers_of(out):
    return json.loads((out / "allocation.json").read_text())["makers"]


def redundant_model(folder):
    """Write a model that loses nothing where each module is shrunk by the method that fits it.

    Half the units of each MLP are dead, which a choice of units sees; q and k have a low rank, but
    all their pairs carry alike, which only low rank sees.
    """
    save_model(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    for name in list(tensors):
        if "gate_proj" in name:
            tensors[name][1::2] = 0.0
        if "q_proj" in name or "k_proj" in name:
            rows, columns = tensors[name].shape
            rank = RANKS[name.split(".")[-2]]
            sizes = ((rows, rank), (rank, columns))
            first, second = (torch.randn(size, generator=generator) for size in sizes)
            tensors[name] = first @ second / (columns * rank) ** 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_each_module_goes_to_the_method_that_loses_nothing_there(model, tmp_path):
    plan = prepared_run(model, tmp_path / "none", **RECIPE).plan
    # What is free: 28 of 56 units, and q and k of 32 x 32 and 16 x 32 down to their ranks, which
    # are those at a share of 0.4.
    units, ranks = 28 * 3 * 32, 32 * 32 - 6 * (32 + 32) + 16 * 32 - 4 * (16 + 32)
    after = plan.parameters_before - LAYERS * (units + ranks)
    options = {**BOTH, "modules": "mlp,qk", "grid": "0.75,0.5,0.4", "multiple_of": 2}
    recipe = {"method": "modegpt", "keep_fraction": after / plan.parameters_before}
    found = compress_local(model, tmp_path / "both", **recipe, options=options)
    assert makers_of(tmp_path / "both") == [{"mlp": "modegpt", "qk": "svdllm"}] * LAYERS
    assert found["compressed"] == pytest.approx(found["dense"], rel=1e-5)
    forms = json.loads((tmp_path / "both/model/config.json").read_text())["layer_forms"]
    assert [(form["intermediate"], form["ranks"]) for form in forms] == [(28, RANKS)] * LAYERS
    alone = {name: value for name, value in options.items() if name != "candidates"}
    compress_local(model, tmp_path / "alone", **recipe, options=alone)
    assert perplexity(tmp_path / "alone", "compressed") != pytest.approx(found["dense"], rel=1e-3)


def test_a_run_of_one_method_alone_is_as_it_was(model, tmp_path):
    own = {name: value for name, value in BOTH.items() if name != "candidates"}
    prepared_alone = prepared_run(model, tmp_path / "a", **{**RECIPE, "options": own})
    named = {**own, "candidates": "modegpt"}
    prepared_named = prepared_run(model, tmp_path / "a", **{**RECIPE, "options": named})
    assert prepared_named.facts == prepared_alone.facts
    assert "candidates" not in prepared_alone.options
    compress_local(model, tmp_path / "a", **{**RECIPE, "options": own})
    config = json.loads((tmp_path / "a/model/config.json").read_text())
    assert "candidates" not in config["compression"]["options"]
    assert "makers" not in config["compression"]
    assert "makers" not in json.loads((tmp_path / "a/allocation.json").read_text())


def test_the_result_is_verified_and_the_report_says_who_shrank_what(undisturbed):
    out, report = undisturbed
    assert report["verdict"] == "READY"
    assert 0 <= 0.65 - report["parameters"]["keep_fraction"] < 8 * 3 * 32 / 20000
    makers = makers_of(out)
    assert {method for layer in makers for method in layer.values()} == {"modegpt", "svdllm"}
    for row, own in zip(report["layers"], makers, strict=True):
        assert {m: cut["method"] for m, cut in row["cuts"].items()} == own
        for cut in row["cuts"].values():
            assert cut["kept"].startswith("ranks" if cut["method"] == "svdllm" else "width")
        # Errors are those of parts that were shrunk: a module, or a linear of low rank.
        assert ("mlp" in row["errors"]) == (own.get("mlp") == "modegpt")
        assert ("q_proj" in row["errors"]) == (own.get("qk") == "svdllm")
    page = render_page(report)
    assert "Method used for each module" in page
    assert "Each module was cut by the method that costs least." in page


def test_the_result_loads_and_computes_what_was_evaluated(model, undisturbed):
    out, report = undisturbed
    config = json.loads((out / "model/config.json").read_text())
    forms = config["layer_forms"]
    assert config["compression"]["makers"] == makers_of(out)
    assert any(form["ranks"] for form in forms)
    assert any(form["intermediate"] < 56 or form["vo_head_dim"] < 8 for form in forms)
    ids = load_file(model / "tokens/evaluation.safetensors")["input_ids"]
    logits = logits_of(out / "model", ids, trust_remote_code=True)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss.exp()) == pytest.approx(
        report["evaluation"]["compressed"]["perplexity"], rel=1e-5
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(model, undisturbed, tmp_path, workers):
    compress_local(model, tmp_path, workers=workers, **RECIPE)
    assert result_files(tmp_path) == result_files(undisturbed[0])


def test_a_driver_that_dies_after_every_unit_leaves_the_same_bytes(model, undisturbed, tmp_path):
    kinds, deaths, reached = ("damage", "layer", "stitch"), 0, []

    def die(event):
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            reached.append(event)
        if event["kind"] in kinds:
            raise DeadDriverError

    while not reached:
        assert deaths < 20
        compress_local(model, tmp_path, listener=die, **RECIPE)
        deaths += 1
    assert deaths == 2 * LAYERS + LAYERS + 1 + 1
    assert result_files(tmp_path) == result_files(undisturbed[0])


def test_damage_of_one_method_is_not_measured_again_when_another_competes(model, tmp_path):
    own = {name: value for name, value in BOTH.items() if name != "candidates"}
    base = {**RECIPE, "keep_statistics": True, "options": own}
    compress_local(model, tmp_path / "one", **base)
    prepared = prepared_run(model, tmp_path / "one", **base)
    points = points_of(
        prepared,
        Wanted(
            names=["modegpt"],
            sizes=[("keep_fraction", 0.9), ("keep_fraction", 0.8)],
            options={k: str(v) for k, v in BOTH.items()},
        ),
    )
    done = []
    sweep_on(
        prepared, points, LocalExecutor(), listener=lambda e: done.append((e["kind"], e["unit"]))
    )
    damages = sorted(unit for kind, unit in done if kind == "damage")
    assert damages == [f"damage-svdllm-layer-{i:05d}" for i in range(LAYERS)]
    for point in points:
        assert makers_of(tmp_path / "one/points" / f"modegpt-{point.config.keep_fraction}")


def test_methods_compete_in_a_step_behind_another(model, tmp_path):
    steps = [
        {"method": "slicegpt", "slice": 0.25, "options": {"round_to": 1}},
        {"method": "modegpt", "keep_fraction": 0.75, "options": {**BOTH, "modules": "mlp,vo"}},
    ]
    compress_local(model, tmp_path / "behind", steps=steps)
    assert any(makers_of(tmp_path / "behind"))
    report = run_local(model, tmp_path / "before", steps=[
        {**steps[1], "keep_fraction": 0.9},
        {"method": "svdllm", "keep_fraction": 0.85, "options": {"modules": "q_proj,k_proj"}},
    ])  # fmt: skip
    assert "cuts" not in report["method"]["steps"][0]
    assert all({"mlp", "vo"} >= row["cuts"].keys() for row in report["layers"])
    assert any(row["cuts"] for row in report["layers"])


def test_refit_works_on_what_several_methods_have_left(model, tmp_path):
    compress_local(model, tmp_path, **{**RECIPE, "options": {**BOTH, "refit": True}})
    values = read_records(Directory(str(tmp_path)))["layer-00000"].values
    assert values["makers"] == makers_of(tmp_path)[0]
    assert (tmp_path / "model/config.json").exists()


def test_the_tiny_model_is_better_where_low_rank_competes(tmp_path):
    def compress(name, **more):
        given = {
            "model": "tiny", "method": "modegpt", "keep_fraction": 0.8, "device": "cpu",
            "out": str(tmp_path / name), "calibration.sequences": 16, "evaluation.sequences": 8,
            "options.probe_tokens": 1024, **more,
        }  # fmt: skip
        prepared = prepare(load_config(None, given))
        open_run(prepared)
        with pytest.raises(DeadDriverError):  # what is verified is another test's
            run_on(prepared, LocalExecutor(), listener=die)
        return prepared.plan

    def die(event):
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            raise DeadDriverError

    compress("alone")
    plan = compress("both", **{"options.candidates": "svdllm"})
    files = (tmp_path / "both/model").glob("*.safetensors")
    after = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert 0 <= 0.8 * plan.parameters_before - after < 8 * 3 * 128
    found, alone = (perplexity(tmp_path / name, "compressed") for name in ("both", "alone"))
    assert found < alone


@pytest.mark.parametrize(
    ("options", "error_class", "words"),
    [
        ({"candidates": "svdlm"}, ConfigError, "options.candidates: unknown method 'svdlm'"),
        ({"candidates": "slicegpt"}, ConfigError, "slicegpt rotates the residual stream"),
        (
            {"candidates": "svdllm", "allocation": "influence"},
            ConfigError,
            "unless damage is measured",
        ),
        ({"candidates": "svdllm", "grid": "2"}, PlanError, "grid is 2; it must be fractions"),
    ],
)
def test_who_cannot_compete_is_refused_at_the_door(model, tmp_path, options, error_class, words):
    for where, recipe in (
        ("", {**RECIPE, "options": options}),
        ("steps[0]", {"steps": [
            {"method": "modegpt", "keep_fraction": 0.9, "options": {**options, "modules": "mlp"}},
            {"method": "svdllm", "keep_fraction": 0.85, "options": {"modules": "q_proj"}},
        ]}),
    ):  # fmt: skip
        with pytest.raises(error_class) as caught:
            prepared_run(model, tmp_path / "never", **recipe)
        assert words in str(caught.value)
        assert str(caught.value).startswith(where)
    assert not (tmp_path / "never").exists()
