"""Every command on the pages and in `--help` is one of ours, of Ray's or of make as it stands.

`tests/test_pages.py` executes them.
"""

import importlib
import shlex
import subprocess

import click
import pytest
import yaml

from orchestrator.experiments.batch_file import BUDGET_KEYS, KEYS
from tests.pages import HELP, PAGES, ROOT, typed

GROUPS = {"compress-cluster": "orchestrator.cli.main", "ray": "ray.scripts.scripts"}
EVERYTHING = typed()


def words_of(text):
    words = shlex.split(text)
    return words[: min((words.index(w) for w in (">", "&") if w in words), default=len(words))]


COMMANDS = [words_of(each.text) for each in EVERYTHING if each.kind == "sh"]


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] in GROUPS], ids=" ".join)
def test_the_command_line_takes_it(words):
    command, rest = importlib.import_module(GROUPS[words[0]]).cli, words[1:]
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(click.Context(command), rest)
    command.make_context(name, rest)  # parses; an option that is not there is an error


@pytest.mark.parametrize("target", [e.text for e in EVERYTHING if e.text.startswith("make ")])
def test_make_has_the_target(target):
    done = subprocess.run(
        [*target.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_are_commands_of_every_kind_and_of_every_page():
    verbs = {each.text.split()[1] for each in EVERYTHING if each.text.startswith("compress-")}
    assert {"run", "plan", "submit", "watch", "batch", "doctor", "cluster"} <= verbs
    assert {each.page for each in EVERYTHING} == {HELP, *(page.name for page in PAGES)}


def test_the_batch_file_of_the_docs_has_the_keys_of_a_batch():
    (document,) = (yaml.safe_load(each.text) for each in EVERYTHING if each.kind == "yaml")
    assert set(document) <= set(KEYS)
    assert set(document["budget"]) <= set(BUDGET_KEYS)


def test_the_python_of_the_pages_compiles():
    for each in EVERYTHING:
        if each.kind == "python":
            compile(each.text, each.page, "exec")
