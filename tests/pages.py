"""What the pages tell a user to type, in the order in which he meets it."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from orchestrator.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
HELP = "--help"
_GENERATED = re.compile(r"<!-- commands: .*?<!-- end -->", re.DOTALL)  # synopses of all commands
_TYPED = re.compile(r"```(\w+)\n(.*?)```|`([^`]+)`", re.DOTALL)
_INLINE = re.compile(r"(compress-cluster|make|python|\.venv/bin/\w+) ")
_EXAMPLE = re.compile(r"(?<!`)\b(?:compress-cluster|ray)(?: [^\s]+)+")


@dataclass(frozen=True)
class Typed:
    """Something to type: ``sh``, a command; ``python``, a script; ``yaml``, a file to write."""

    page: str
    kind: str
    text: str

    def __str__(self) -> str:
        return self.text.partition("\n")[0]


def typed() -> list[Typed]:
    """Return everything, each command where it comes first."""
    everything = [each for page in PAGES for each in _on_page(page)]
    everything += [Typed(HELP, "sh", text) for text in _in_help(cli)]
    found: dict[tuple[str, str], Typed] = {}
    for each in everything:
        found.setdefault((each.kind, each.text), each)
    return list(found.values())


def _on_page(page: Path) -> Iterator[Typed]:
    for language, block, inline in _TYPED.findall(_GENERATED.sub("", page.read_text())):
        if language == "sh":
            lines = block.replace("\\\n", " ").splitlines()
            commands = [re.split(r"\s+#\s", line)[0].strip() for line in lines]
            yield from (Typed(page.name, "sh", " ".join(text.split())) for text in commands if text)
        elif language in ("python", "yaml"):
            yield Typed(page.name, language, block)
        elif _INLINE.match(inline):
            yield Typed(page.name, "sh", " ".join(inline.split()))


def _in_help(command: click.Command) -> Iterator[str]:
    yield from _EXAMPLE.findall(inspect.cleandoc(command.help or ""))
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _in_help(inner)
