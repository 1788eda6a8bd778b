"""Shell completion: values of options, models, runs. Nothing heavy is imported.

Each function has the signature that click requires: it gets the command line so far, and returns
what may follow. An item of type ``file`` or ``dir`` leaves completion to the shell; it comes first,
because click's script for bash drops the items before it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from planners.spelling import typed

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
FILE, FOLDER = CompletionItem("", type="file"), CompletionItem("", type="dir")
RUNS = Path("runs")  # the default place of runs


def of(*words: str, otherwise: CompletionItem | None = None) -> Completer:
    """Return a completer that proposes some words, and ``otherwise``."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _items(words, incomplete, otherwise)

    return complete


files, folders = of(otherwise=FILE), of(otherwise=FOLDER)


def models(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Propose the short names of models, then folders."""
    from planners.catalogue import CONFIGS

    return _items(("tiny", *CONFIGS), incomplete, FOLDER)


def runs(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Propose run directories: those below the typed path, and those in ``runs/``."""
    places = [Path(incomplete), Path(incomplete).parent, RUNS]
    found = (path for place in places if place.is_dir() for path in sorted(place.iterdir()))
    known = [str(path) for path in found if (path / "plan.json").is_file()]
    return _items(dict.fromkeys(known), incomplete, FOLDER)


def recipes(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Propose the recipes of the package, then files."""
    from orchestrator.recipe.presets import available

    return _items(available(), incomplete, FILE)


def methods(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Propose a method; in a list with commas, the next one."""
    from actors.methods import available

    before = incomplete[: incomplete.rfind(",") + 1]
    return _items((before + name for name in available()), incomplete)


def steps(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Propose the method of a step."""
    from actors.methods import available

    return _items((f"{name}:" for name in available()), incomplete)


def options(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Propose ``KEY=VALUE`` of the method that is named, or of the default one."""
    from actors.methods import available, declared_options
    from orchestrator.recipe.config import DEFAULT_METHOD, SLICED_METHOD

    usual = SLICED_METHOD if context.params.get("slice") is not None else DEFAULT_METHOD
    named = str(context.params.get("method") or usual).split(",")
    pairs = (
        f"{option.name}={typed(value)}"
        for name in named
        if name in available()
        for option in declared_options(name)
        for value in option.choices or (option.default,)
    )
    return _items(dict.fromkeys(pairs), incomplete)


def points(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Propose the points of the sweep of the run that is named."""
    # An option whose value is still to come ends click's parsing, and what stood before is in args.
    run = context.params.get("run_uri") or "".join(context.args[:1])
    try:
        found = json.loads((Path(run) / "pareto.json").read_text())
    except (OSError, ValueError):
        return []  # no sweep here: nothing to propose
    return _items((str(point["name"]) for point in found["points"]), incomplete)


def of_option(name: str, words: Sequence[str]) -> Completer | None:
    """Return the completer for the values of an option that sets a key of the recipe.

    Args:
        name: such as ``--method``.
        words: those that its value must be one of, if any.
    """
    sources = of("stdlib", "wikitext2", "embedded", "tokens:", otherwise=FILE)
    known = {
        "--method": methods, "--step": steps, "--option": options, "--stats": runs,
        "--out": folders, "--model-store": folders, "--calibration": sources,
        "--evaluation": sources, "--address": of("local", "auto"),
    }  # fmt: skip
    return known.get(name) or (of(*words) if words else None)


def _items(
    words: Iterable[str], incomplete: str, otherwise: CompletionItem | None = None
) -> list[CompletionItem]:
    found: Iterator[str] = (word for word in words if word.startswith(incomplete))
    return [*([otherwise] if otherwise else []), *map(CompletionItem, found)]


class _Bash(BashComplete):
    """Click's completion for bash, with ``KEY=VALUE``, which bash passes as three words, joined."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the incomplete one, and the incomplete one, joined at =."""
        before, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in (*before, incomplete):
            joins = words and (word == "=" or words[-1].endswith("="))
            words[-1:] = [words[-1] + word] if joins else [*words[-1:], word]
        self._typed = words[-1][: len(words[-1]) - len(incomplete.lstrip("="))]
        if words[-1] == incomplete:
            self._typed = ""
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return an item without the part that bash counts as earlier words."""
        return f"{item.type},{item.value.removeprefix(self._typed)}"


add_completion_class(_Bash)
