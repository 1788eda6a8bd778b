"""The recipes that come with the package: each is valid, says what it is for, and can be run."""

import json

import pytest
from click.testing import CliRunner

from actors.storage.sources import hub_place
from orchestrator.cli.main import cli
from orchestrator.recipe import presets
from orchestrator.recipe.reading import load_config
from planners.errors import ConfigError
from tests.builders import save_model


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
