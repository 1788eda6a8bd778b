"""Refusals as users and scripts meet them: exit code, one JSON document, nothing left behind."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.test_headers import PAIR, Payload, file_of
from tests.bad_input.warm import command_line

NAMES = {2: {"ConfigError", "PlanError"}, 3: {"ModelError", "DataError"}, 6: {"StorageError"}}


@pytest.fixture
def given(model, tmp_path):
    """Return the arguments of a run of the model; None instead of a value leaves an option out."""

    def arguments(**options):
        words = {
            "slice": "0.25",
            "calibration": f"tokens:{model}/tokens/calibration.safetensors",
            "evaluation": f"tokens:{model}/tokens/evaluation.safetensors",
            "device": "cpu",
            "out": tmp_path / "out",
            **options,
        }
        pairs = [(f"--{k.replace('_', '-')}", v) for k, v in words.items() if v is not None]
        return ["run", model, *(str(word) for pair in pairs for word in pair)]

    return arguments


@pytest.fixture
def refused(tmp_path):
    """Return a function that gives the command line arguments, and returns its complaint."""

    def call(arguments, exit_code, *words):
        plain = command_line(arguments, folder=tmp_path)
        assert (plain.exit_code, plain.stdout) == (exit_code, "")
        as_json = command_line([*arguments, "--json"], folder=tmp_path)
        assert as_json.exit_code == exit_code
        document = json.loads(as_json.stdout)
        assert list(document) == ["error"]
        error = document["error"]
        assert sorted(error) == ["class", "hint", "message"]
        assert error["class"] in NAMES[exit_code]
        for stderr in (plain.stderr, as_json.stderr):
            assert f"{error['class']}: {error['message']}\n" in stderr
            assert "Traceback" not in stderr
        for word in words:
            assert word in f"{error['message']}; {error['hint']}"
        assert not (tmp_path / "out" / "READY").exists()
        assert not (tmp_path / "out" / "model").exists()

    return call


def test_a_sound_model_passes(given, tmp_path):
    done = command_line([*given(), "--dry-run", "--json"], folder=tmp_path)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["plan"]["parameters_after"] > 0


def test_no_such_model(refused):
    refused(["run", "./nothing"], 3, "model './nothing': no such directory", "llama-2-7b")


def test_no_such_option(refused, given):
    refused([*given(), "--keep", "0.8"], 2, "--keep", "--help")


def test_an_option_that_is_no_number(refused, given):
    refused(given(slice="a quarter"), 2, "--slice", "'a quarter' is not a valid float")


def test_an_option_of_no_method(refused, given):
    refused([*given(), "--option", "roundto=8"], 2, "options.roundto", "did you mean round_to?")


def test_an_option_without_value(refused, given):
    refused([*given(), "--option", "round_to"], 2, "--option round_to: must be KEY=VALUE")


def test_a_recipe_with_a_mistake(refused, given, tmp_path):
    (tmp_path / "recipe.yaml").write_text("calibration: {source: stdlib, seqences: 4}")
    arguments = given(recipe="recipe.yaml")
    refused(arguments, 2, "calibration.seqences: unknown key; did you mean calibration.sequences?")


def test_a_recipe_that_would_run_code(refused, given, tmp_path, canary):
    (tmp_path / "recipe.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{canary}']")
    refused(given(recipe="recipe.yaml"), 2, "recipe recipe.yaml, line 1: is not YAML")


def test_a_size_that_is_impossible(refused, given):
    refused(given(slice=None, keep_fraction="0.01"), 2, "cannot be met", "--keep-fraction 0.")


def test_a_pickle(refused, given, model, canary):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    refused(given(), 3, "only pickle weights (pytorch_model.bin)")


def test_a_hostile_header(refused, given, model):
    (model / "model.safetensors").write_bytes(file_of(PAIR, length=2**62))
    refused(given(), 3, f"{model}/model.safetensors: not a safetensors file, or truncated")


def test_an_index_that_leaves_the_model(refused, given, model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(given(), 3, "'lm_head.weight' is in '../secret.safetensors'")


def test_a_tensor_that_is_no_number(refused, given, model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((32,), torch.inf)
    save_file(tensors, model / "model.safetensors")
    refused(given(), 3, "tensor model.norm.weight has 32 entries that are NaN or infinite")


def test_a_config_of_another_family(refused, given, edit):
    edit("config.json", model_type="gpt2")
    refused(given(), 3, "model_type 'gpt2' is not supported; supported: cohere, ")


def test_a_text_that_is_too_short(refused, given, tmp_path):
    (tmp_path / "short.txt").write_text("A few words.")
    refused(given(calibration="short.txt"), 3, "short.txt: has ", "tokens, but one sequence needs")


def test_an_output_that_is_a_file(refused, given, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(given(out="file"), 6, "cannot write to the run directory")


def test_an_output_that_is_no_run(refused, given, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(given(out="mine"), 6, "holds 'notes.txt' and is not a run directory")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", ["eval", "plan"])
def test_a_model_of_nothing(refused, model, command):
    (model / "config.json").write_text("{}")
    refused([command, model], 3, "config.json: model_type is missing")


@pytest.mark.parametrize("command", ["report", "status"])
def test_a_run_that_is_none(refused, tmp_path, command):
    refused([command, tmp_path / "out"], 6, str(tmp_path / "out"))


def test_a_run_that_was_only_opened_has_no_report(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text("{")
    refused(["report", tmp_path / "out"], 6, "has no finished run")


def test_a_run_whose_plan_is_torn_has_a_status(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text("{")
    done = command_line(["status", tmp_path / "out", "--json"], folder=tmp_path)
    assert (done.exit_code, json.loads(done.stdout)["verdict"]) == (0, "stopped")


@pytest.mark.slow
def test_the_installed_command_says_the_same(given, model):
    (model / "model.safetensors").write_bytes(b"")
    program = Path(sys.executable).with_name("compress-cluster")
    done = subprocess.run([program, *given(), "--json"], capture_output=True, text=True)
    error = json.loads(done.stdout)["error"]
    message = f"{model}/model.safetensors: 0 bytes are too short for a safetensors file"
    assert (done.returncode, error["class"], error["message"]) == (3, "ModelError", message)
    assert done.stderr.endswith(f"ModelError: {message}\n")


def test_a_path_is_called_what_the_user_calls_it(refused, tmp_path):
    (tmp_path / "results").mkdir()
    refused(["report", "results"], 6, "results: has no finished run", "status results shows")
    refused(["report", tmp_path / "results"], 6, f"{tmp_path}/results: has no finished run")
    said = command_line(["report", "results"], folder=tmp_path)
    assert str(tmp_path) not in said.stderr


def test_a_recipe_and_a_batch_are_told_apart(refused, tmp_path):
    (tmp_path / "many.yaml").write_text("out: x\nruns: [{model: tiny}]\n")
    refused(["run", "-r", "many.yaml"], 2, "is a batch file", "compress-cluster batch many.yaml")
    (tmp_path / "one.yaml").write_text("model: tiny\nout: x\n")
    refused(["batch", "one.yaml"], 2, "one.yaml: is a recipe", "compress-cluster run -r one.yaml")
