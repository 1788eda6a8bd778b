from click.testing import CliRunner

from actors import methods
from orchestrator.cli import cli
from orchestrator.options import method_options


def test_help_shows_the_options_that_each_method_has():
    assert method_options() == {name: methods.spec(name).options for name in methods.available()}


def test_help_of_a_run_names_every_default_of_every_method():
    words = CliRunner().invoke(cli, ["run", "--help"]).output.split()
    for name, options in method_options().items():
        assert name in words
        assert {option.name for option in options} <= {word.partition("=")[0] for word in words}
