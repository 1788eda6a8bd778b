import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from actors.methods import available, declared, declared_options, spec
from orchestrator.cli.main import cli
from orchestrator.cli.options import config_of, recipe_options
from orchestrator.recipe.config import SECTIONS, RecoverConfig, RunConfig
from planners.errors import ConfigError

HAND_WRITTEN = {"model", "layer_options", "place_seconds", "calibration.bos"}  # in a file only
HAND_WRITTEN |= {
    f"recover.{key}"
    for key in RecoverConfig.model_fields
    if key not in ("mode", "data", "tokens", "trains", "teacher", "replace")
}


def test_help_shows_the_options_that_each_method_has():
    for name in available():
        assert declared_options(name) == spec(name).options
        found = declared(name)
        assert (found.source, found.modules) == (spec(name).source, spec(name).modules)


def test_help_of_a_run_names_every_default_of_every_method():
    words = CliRunner().invoke(cli, ["run", "--help"]).output.split()
    for name in available():
        assert name in words
        known = {option.name for option in declared_options(name)}
        assert known <= {word.partition("=")[0] for word in words}


def test_every_key_of_a_recipe_but_a_few_has_an_option_that_sets_it():
    keys = {key for key in RunConfig.model_fields if key not in SECTIONS}
    keys |= {f"{name}.{key}" for name, part in SECTIONS.items() for key in part.model_fields}
    assert set(recipe_options()) == keys - HAND_WRITTEN


@pytest.mark.parametrize("command", ["run", "plan", "submit", "eval"])
def test_help_says_what_is_used_where_an_option_of_the_recipe_is_not_given(command):
    context = click.Context(cli.commands[command])
    for option in cli.commands[command].get_params(context):
        without = ("slice", "steps", "stats", "keep_statistics")  # nothing is done then
        if option.name in set(recipe_options()) - set(without):
            assert option.help.endswith("]"), option.opts


def test_steps_are_written_with_colons_and_survive_commas():
    found = config_of(
        "tiny",
        {
            "recipe": None,
            "steps": ("modegpt:0.9:modules=mlp,vo:grid=0.9,0.5", "slicegpt:slice=0.25"),
        },
    )
    assert [(s.method, s.keep_fraction, s.slice, s.options) for s in found.steps] == [
        ("modegpt", 0.9, None, {"modules": "mlp,vo", "grid": "0.9,0.5"}),
        ("slicegpt", None, 0.25, {}),
    ]


@pytest.mark.parametrize("text", ["modegpt", ":0.9", "modegpt:modules=mlp", "modegpt:x", ""])
def test_a_step_that_says_no_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="--step") as caught:
        config_of("tiny", {"recipe": None, "steps": (text,)})
    assert "number" in str(caught.value) or "--step modegpt:0.9" in caught.value.hint


MISTYPED = [
    (["run", "--method", "slicegp"], "method: unknown method 'slicegp'; did you mean slicegpt?"),
    (["plan", "--step", "svdlm:0.9"], "steps[0].method: unknown method 'svdlm'; did you mean svd"),
    (["submit", "--method", "ModeGTP"], "unknown method 'ModeGTP'; did you mean modegpt?"),
    (["sweep", "runs/x", "--method", "modegpt,slicgpt", "--keep-fraction", "0.8"],
     "--method: unknown method 'slicgpt'; did you mean slicegpt?"),
    (["run", "--option", "roundto=8"], "has no such option; did you mean round_to?"),
    (["run", "--slice", "0.2", "--option", "schedule=sequental"], "did you mean sequential?"),
    (["run", "--option", "allocation=margnal"], "did you mean marginal?"),
    (["run", "--device", "cda"], "it must be auto, cpu or cuda; did you mean cuda?"),
    (["run", "-r", "quik"], "recipe quik: No such file or directory; did you mean quick?"),
    (["recipes", "show", "two-step"], "comes with the package; did you mean two-steps?"),
]  # fmt: skip
HEAVY = ("ray", "torch", "transformers")
ALL_IN_ONE = f"""
import json, sys
from click.testing import CliRunner
from orchestrator.cli.main import cli
said = [str(CliRunner().invoke(cli, words).exception) for words in json.load(sys.stdin)]
print(json.dumps([said, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def test_a_mistyped_word_is_refused_with_the_one_that_was_meant_before_anything_heavy_is_there():
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE], input=json.dumps([words for words, _ in MISTYPED]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, imported = json.loads(done.stdout)
    for (words, right), message in zip(MISTYPED, said, strict=True):
        assert right in message, words
    assert imported == []
