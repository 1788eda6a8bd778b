"""Every command in README.md and docs/ is one of ours as it stands; the cheap ones are run."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from orchestrator.batch import BUDGET_KEYS, KEYS
from orchestrator.cli import cli, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHEAP = ("cluster lint", "doctor", "methods", "schema", "plan llama-2-70b")  # no worker, no weights


def blocks(language):
    for page in PAGES:
        yield from re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands():
    found = []
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["compress-cluster"]:
                found.append(words[1 : words.index(">")] if ">" in words else words[1:])
    return found


COMMANDS = commands()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_command_line_takes_it(words):
    group, rest = cli, list(words)
    while isinstance(group, click.Group):
        name, command, rest = group.resolve_command(click.Context(group), rest)
        group = command
    command.make_context(name, rest)  # parses; an option that is not there is an error


@pytest.mark.parametrize(
    "words", [w for w in COMMANDS if " ".join(w).startswith(CHEAP)], ids=" ".join
)
def test_it_does_what_it_says(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # a Hub that is away is no error
    main(words)
    assert capsys.readouterr().out.strip()


def test_there_are_commands_of_every_kind():
    assert {"run", "plan", "submit", "watch", "batch", "doctor", "cluster"} <= {
        words[0] for words in COMMANDS
    }


def test_the_batch_file_of_the_docs_has_the_keys_of_a_batch():
    (document,) = (yaml.safe_load(block) for block in blocks("yaml"))
    assert set(document) <= set(KEYS)
    assert set(document["budget"]) <= set(BUDGET_KEYS)


def test_the_python_of_the_pages_compiles():
    for block in blocks("python"):
        compile(block, "page", "exec")
