"""Lists: methods, recipes and their schema, the kept statistics of a run."""

from dataclasses import asdict
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from orchestrator.cli import completion
from orchestrator.cli.options import as_json, run_argument
from orchestrator.cli.output import echo, emit, stdout
from orchestrator.recipe import presets
from planners.spelling import typed


@click.command()
@as_json
def methods(json_: bool) -> None:
    """List the methods, their options and defaults."""
    from actors.methods import available, declared

    specs = [declared(name) for name in available()]
    document = [
        {"name": s.name, "source": s.source, "modules": s.modules,
         "options": [asdict(option) for option in s.options]}
        for s in specs
    ]  # fmt: skip

    def show() -> None:
        for each in specs:
            words = f"{each.source}, shrinks {', '.join(each.modules)}"
            stdout.print(Text(each.name, style="bold"), words)
            table = Table(box=None, show_header=False, padding=(0, 2))
            for option in each.options:
                choices = ", ".join(map(typed, option.choices))
                one_of = f" (one of: {choices})" if choices else ""
                table.add_row(f"{option.name}={typed(option.default)}", f"{option.help}{one_of}")
            stdout.print(table)
        stdout.print("set an option with --option KEY=VALUE; the defaults are shown")

    emit(document, show, json_=json_)


@click.command()
@as_json
def families(json_: bool) -> None:
    """List the model types, and what each method does with them."""
    from actors.methods import available, spec
    from orchestrator.prepare.support import supported

    rows = supported([spec(name) for name in available()])

    def show() -> None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("model type", "family", *rows[0]["methods"]):
            table.add_column(column, overflow="fold")
        reasons: list[str] = []
        for row in rows:
            cells = [_answer(found, reasons) for found in row["methods"].values()]
            table.add_row(row["model_type"], row["family"], *cells)
        stdout.print(table)
        for number, reason in enumerate(reasons, start=1):
            stdout.print(Text(f"({number}) {reason}"), soft_wrap=True)

    emit({"families": rows}, show, json_=json_)


def _answer(found: dict[str, Any], reasons: list[str]) -> Text:
    """Return yes, no or the modules that are compressed, with the numbers of the reasons."""
    why = [found["reason"], *found["left"].values()]
    for reason in filter(None, why):
        if reason not in reasons:
            reasons.append(reason)
    numbers = ",".join(str(reasons.index(reason) + 1) for reason in filter(None, why))
    text = "no" if found["reason"] else "yes" if not found["left"] else ", ".join(found["modules"])
    return Text(text).append(f" ({numbers})" if numbers else "", "dim")


@click.group()
def recipes() -> None:
    """List or print the included recipes."""


@recipes.command("ls")
@as_json
def recipes_ls(json_: bool) -> None:
    """List the recipes and their purpose."""
    found = presets.available()

    def show() -> None:
        table = Table.grid(padding=(0, 2))
        for name, purpose in found.items():
            table.add_row(Text(name, style="bold"), purpose)
        stdout.print(table)
        said = "compress-cluster run MODEL -r NAME uses one; recipes show NAME prints it"
        stdout.print(Text(said, "dim"))

    emit({"recipes": found}, show, json_=json_)


@recipes.command("show")
@click.argument("name", shell_complete=completion.recipes)
def recipes_show(name: str) -> None:
    """Print a recipe, to edit and pass to -r."""
    echo(presets.text(name), nl=False)


@click.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors.

    \b
    compress-cluster schema > recipe.schema.json
    # yaml-language-server: $schema=recipe.schema.json       as the first line of a recipe
    """  # noqa: D301 click's mark for lines to leave as they are
    import json

    from orchestrator.recipe.config import RunConfig

    echo(json.dumps(RunConfig.model_json_schema(), indent=1))


@click.group()
def stats() -> None:
    """Inspect the kept statistics of a run.

    `run --keep-statistics` keeps them; `run --stats RUN` uses them for another run.
    """


@stats.command("ls")
@run_argument
@as_json
def stats_ls(run_uri: str, json_: bool) -> None:
    """List the layers: taps, tokens, bytes."""
    from actors.storage.files import Directory
    from orchestrator.report.numbers import bytes_text
    from orchestrator.rundir.statistics import list_

    rows = list_(Directory(run_uri))

    def show() -> None:
        table = _titled(run_uri)
        for column in ("layer", "tokens", "bytes", "taps"):
            table.add_column(column, justify="left" if column == "taps" else "right")
        for row in rows:
            cells = str(row["layer"]), f"{row['num_tokens']:,}", bytes_text(row["bytes"])
            table.add_row(*cells, ", ".join(row["taps"]))
        stdout.print(table)

    emit({"run": run_uri, "layers": rows}, show, json_=json_)


@stats.command("show")
@run_argument
@as_json
def stats_show(run_uri: str, json_: bool) -> None:
    """Show model, data, sequence length and taps."""
    from actors.storage.files import Directory
    from orchestrator.rundir.statistics import describe

    found = describe(Directory(run_uri))

    def show() -> None:
        table = _titled(run_uri, show_header=False)
        for key, value in found.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(key.replace("_", " "), text)
        stdout.print(table)

    emit(found, show, json_=json_)


@stats.command("verify")
@run_argument
@as_json
def stats_verify(run_uri: str, json_: bool) -> None:
    """Check every file against its record."""
    from actors.storage.files import Directory
    from orchestrator.report.numbers import bytes_text
    from orchestrator.rundir.statistics import verify

    found = verify(Directory(run_uri))
    said = f"{found['files']} files of {found['layers']} layers, {bytes_text(found['bytes'])}: as "
    said += "recorded; every sum is finite, every Gram matrix symmetric"
    emit(found, lambda: stdout.print(said, soft_wrap=True), json_=json_)


def _titled(title: str, **look: Any) -> Table:
    return Table(title=title, title_justify="left", **look)


ALL = (families, methods, recipes, schema, stats)
