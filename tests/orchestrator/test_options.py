import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from actors import methods
from orchestrator.cli.main import cli
from orchestrator.cli.options import config_of, method_options
from planners.errors import ConfigError


def test_help_shows_the_options_that_each_method_has():
    assert method_options() == {name: methods.spec(name).options for name in methods.available()}


def test_help_of_a_run_names_every_default_of_every_method():
    words = CliRunner().invoke(cli, ["run", "--help"]).output.split()
    for name, options in method_options().items():
        assert name in words
        assert {option.name for option in options} <= {word.partition("=")[0] for word in words}


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
