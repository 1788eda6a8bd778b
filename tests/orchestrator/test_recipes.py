"""The recipes that come with the package: each is valid, says what it is for, and can be run."""

import json

import pytest
import yaml
from click.testing import CliRunner

from actors.storage.sources import hub_place
from orchestrator.cli.main import cli
from orchestrator.recipe import presets
from orchestrator.recipe.reading import load_config
from planners.errors import ConfigError
from tests.builders import run_local, save_model


@pytest.mark.parametrize("name", presets.available())
def test_each_is_a_recipe_and_says_what_it_is_for(name):
    assert len(presets.available()[name]) > 20
    config = load_config(name, {})
    assert config.steps or config.method


@pytest.mark.parametrize("name", presets.available())
def test_each_says_what_it_needs_from_elsewhere(name):
    config, text = load_config(name, {}), presets.text(name)
    sources = {config.calibration.source, config.evaluation.source}
    far = "wikitext2" in sources or hub_place(config.model) is not None
    assert ("# Needs: " in text) == far


def test_a_recipe_is_run_by_its_name_and_the_command_line_is_on_top(tmp_path):
    model = save_model(tmp_path / "model")
    tokens = f"tokens:{model}/tokens/calibration.safetensors"
    asked = ["plan", str(model), "-r", "quick", "--keep-fraction", "0.7", "--device", "cpu",
             "--calibration", tokens, "--evaluation", tokens, "--json"]  # fmt: skip
    done = CliRunner().invoke(cli, asked, catch_exceptions=False)
    identity = json.loads(done.stdout)["identity"]
    assert identity["options"]["allocation"] == "uniform"
    assert identity["keep_fraction"] == 0.7


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").write_text("method: svdllm\n")
    assert load_config("quick", {}).method == "svdllm"


def test_they_are_listed_and_shown():
    listed = CliRunner().invoke(cli, ["recipes", "ls", "--json"], catch_exceptions=False)
    assert json.loads(listed.stdout)["recipes"] == presets.available()
    shown = CliRunner().invoke(cli, ["recipes", "show", "stock"], catch_exceptions=False)
    assert shown.stdout == presets.text("stock")


@pytest.mark.parametrize("name", ["nothing", "../best", ""])
def test_a_name_that_is_none_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match="no recipe") as caught:
        presets.text(name)
    assert "best" in caught.value.hint


@pytest.mark.parametrize(("model", "name"), [("llama-2-13b", "fit-24gb"), ("llama-2-7b", "small")])
def test_recipes_of_bits_can_be_planned_for_large_models(model, name):
    asked = ["plan", model, "-r", name, "--cluster", "8xA100-80GB"]
    done = CliRunner().invoke(cli, asked, catch_exceptions=False)
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert "by measured damage, from 3/" in said
    assert "weights" in said
    assert "parameters" not in said


@pytest.mark.slow
def test_a_recipe_of_bits_makes_a_small_model_with_a_card_and_a_report_in_bytes(tmp_path):
    model = save_model(tmp_path / "model", num_hidden_layers=1, intermediate_size=64)
    recipe = yaml.safe_load(presets.text("small"))
    report = run_local(model, tmp_path / "run", **recipe)
    kinds, stored = report["storage"]["kinds"], report["storage"]
    index = json.loads((tmp_path / "run/model/model.safetensors.index.json").read_text())
    assert sum(kind["after"] for kind in kinds) == stored["after"]
    assert index["metadata"]["total_size"] == stored["after"]
    assert sum(kind["before"] for kind in kinds) == report["bytes"]["before"]
    assert stored["bits"]["of_input"] <= 3.5
    assert stored["dtype"] == {"before": "float32", "after": "bfloat16"}
    (layer,) = report["layers"]
    assert all(0 < m["error"] <= m["nearest"] for m in layer["matrices"] if m.get("scheme"))
    card = (tmp_path / "run/model/README.md").read_text()
    assert f"{stored['bits']['after']:.3g}" in card
    assert "`pip install compressed-tensors`" in card
    assert "bits a weight, scales included; " in card or report["parameters"]["keep_fraction"] == 1
