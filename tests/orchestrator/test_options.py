import pytest
from click.testing import CliRunner

from actors import methods
from orchestrator.cli import cli
from orchestrator.options import config_of, method_options
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
