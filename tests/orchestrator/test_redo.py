"""Layers that are made again, and what is said of two runs that differ."""

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from actors.storage.files import Directory
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli import diff
from orchestrator.cli.main import cli
from orchestrator.experiments.redo import layers_of, with_overrides, withdraw
from orchestrator.phases.open_run import check_run, open_run, recipe_of
from orchestrator.prepare.prepare import prepare
from orchestrator.run import run_on
from orchestrator.rundir.finished import finished_report
from planners.errors import ConfigError, StorageError
from tests.builders import prepared_run, result_files, run_local, save_model, started

RECIPE = {"method": "modegpt", "keep_fraction": 0.8, "options": {"allocation": "uniform"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    run_local(model, out, **RECIPE)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def redone(out, layers, options):
    """Do what `orchestrator.experiments.redo.redo` does, without a cluster; return the report."""
    run = Directory(str(out))
    prepared = prepare(with_overrides(recipe_of(run), layers, options))
    withdraw(prepared, layers)
    assert finished_report(run) is None
    open_run(prepared)
    return run_on(prepared, LocalExecutor(), listener=[].append)


def test_a_layer_is_made_again_with_an_option_of_its_own(copied):
    before, files = started(copied), result_files(copied)
    report = redone(copied, [1, 2], {"ridge": "0.5"})
    assert report["verdict"] == "READY"
    own = {"1": {"ridge": 0.5}, "2": {"ridge": 0.5}}
    assert report["method"]["steps"][0]["layer_options"] == own
    assert recipe_of(Directory(str(copied))).layer_options == {1: own["1"], 2: own["2"]}
    after, new = started(copied), result_files(copied)
    changed = {name for name in files if name.endswith(".safetensors") and files[name] != new[name]}
    assert changed == {"model-00003-of-00007.safetensors", "model-00004-of-00007.safetensors"}
    again = {unit for unit in before if after[unit] != before[unit]}
    for prefix in ("statistics-", "layer-"):
        units = {unit for unit in again if unit.startswith(prefix)}
        assert units == {f"{prefix}{middle}" for middle in names_of(prefix)}
    assert not {unit for unit in again if unit.startswith(("embedding", "head", "evaluation-d"))}
    assert {"verify", "stitch"} <= again


def names_of(prefix):
    return ("layer-00001", "layer-00002") if prefix == "statistics-" else ("00001", "00002")


def test_a_layer_that_is_made_again_as_it_was_has_the_same_bytes(copied):
    before, files = started(copied), result_files(copied)
    redone(copied, [3], {})
    assert result_files(copied) == files
    assert started(copied)["layer-00003"] != before["layer-00003"]
    assert started(copied)["layer-00002"] == before["layer-00002"]


def test_the_command_that_made_a_run_does_not_undo_what_was_redone(model, copied):
    redone(copied, [0], {"ridge": "0.5"})
    with pytest.raises(ConfigError, match=r"layer options was .*ridge.*, is None"):
        check_run(prepared_run(model, copied, **RECIPE))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"nosuch": "1"}, "no such option"), ({"round_to": "4"}, "the same for all layers"),
     ({"damage": "loss"}, "the same for all layers"), ({"ridge": "much"}, "must be a number")],
)  # fmt: skip
def test_an_option_that_no_layer_can_have_alone_is_refused(model, tmp_path, options, words):
    config = prepared_run(model, tmp_path / "x", **RECIPE).config
    with pytest.raises(ConfigError, match=words):
        prepare(with_overrides(config, [1], options))


def test_layers_are_named_as_pages_are():
    assert layers_of("17,3, 20-22") == [3, 17, 20, 21, 22]
    for text in ("", "a", "3-", "-3", "1,,2", "5-3", "1-99999999999"):
        with pytest.raises(ConfigError, match="--layers"):
            layers_of(text)


def told(*arguments):
    result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    return result.output


def test_two_runs_are_told_apart_by_recipe_layers_and_evaluation(model, finished, tmp_path):
    other = tmp_path / "other"
    run_local(model, other, **{**RECIPE, "keep_fraction": 0.7}, threads=1)
    found = json.loads(told("diff", finished, other, "--json"))
    recipe = {row["what"]: (row["a"], row["b"]) for row in found["recipe"]}
    assert recipe == {"keep_fraction": (0.8, 0.7)}
    assert found["data"] == found["versions"] == []
    layers = {row["what"] for row in found["layers"]}
    assert "layer 0.widths.intermediate" in layers
    assert any("error" in what for what in layers)
    evaluation = {row["what"]: row for row in found["evaluation"]}
    reports = [finished_report(Directory(str(out))) for out in (finished, other)]
    row = evaluation["evaluation.compressed.perplexity"]
    assert [row["a"], row["b"]] == [
        r["evaluation"]["compressed"]["perplexity"] for r in reports
    ]  # fmt: skip
    assert "evaluation.dense.perplexity" not in evaluation
    page = told("diff", finished, other)
    assert "keep_fraction" in page
    assert "data      the same" in page
    assert "layer 0." not in page
    assert "perplexity" in page
    assert len(page.splitlines()) <= 24
    everything = told("diff", finished, other, "--details")
    assert "layer 0.widths.intermediate" in everything


def test_of_two_methods_the_options_of_one_alone_are_only_named(model, finished, tmp_path):
    other = tmp_path / "other"
    run_local(model, other, method="svdllm", keep_fraction=0.8)
    page = told("diff", finished, other)
    assert "options that only the method of A has: " in page
    assert "allocation  " not in page
    assert "not finished" not in page
    assert page.count("READY") == 2
    (other / "READY").unlink()
    page = told("diff", finished, other)
    assert "B UNFINISHED" in page
    assert "not finished" in page


def test_a_run_does_not_differ_from_itself_and_what_is_no_run_is_refused(finished, tmp_path):
    found = json.loads(told("diff", finished, finished, "--json"))
    assert all(not rows for name, rows in found.items() if name not in "ab")
    with pytest.raises(StorageError, match="no run here"):
        diff.diff(str(finished), str(tmp_path / "nothing"), details=False, json_=True)


def test_commands_that_look_import_neither_torch_nor_ray():
    code = (
        "import sys, orchestrator.cli.main, orchestrator.cli.status, orchestrator.cli.diff;"
        "print([m for m in ('torch', 'ray', 'transformers', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
