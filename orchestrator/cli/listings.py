"""Print methods, their options, and kept statistics."""

import json

from rich.table import Table
from rich.text import Text

from actors import methods as registry
from actors.storage.files import Directory
from orchestrator.cli.output import stdout
from orchestrator.report.numbers import bytes_text
from orchestrator.rundir import statistics as artefact
from planners.canonical_json import to_json


def statistics(action: str, run_uri: str, *, json_: bool) -> None:
    """List, show or verify the statistics that a run kept."""
    run_ = Directory(run_uri)
    if action == "ls":
        rows = artefact.list_(run_)
        if json_:
            print(json.dumps({"run": run_uri, "layers": rows}))  # noqa: T201 the one document
            return
        table = Table(title=run_uri, title_justify="left")
        for column in ("layer", "tokens", "bytes", "taps"):
            table.add_column(column, justify="left" if column == "taps" else "right")
        for row in rows:
            table.add_row(
                str(row["layer"]), f"{row['num_tokens']:,}", bytes_text(row["bytes"]),
                ", ".join(row["taps"]),
            )  # fmt: skip
        stdout.print(table)
        return
    found = artefact.describe(run_) if action == "show" else artefact.verify(run_)
    if json_:
        print(json.dumps(found))  # noqa: T201 the one document
    elif action == "show":
        table = Table(title=run_uri, title_justify="left", show_header=False)
        for key, value in found.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(key.replace("_", " "), text)
        stdout.print(table)
    else:
        stdout.print(
            f"{found['files']} files of {found['layers']} layers, {bytes_text(found['bytes'])}: as "
            "recorded; every sum finite, every gram symmetric",
            soft_wrap=True,
        )


def methods(*, json_: bool) -> None:
    """Print every method with its options and defaults."""
    specs = [registry.spec(name) for name in registry.available()]
    if json_:
        plain = [
            {"name": s.name, "source": s.source, "modules": s.modules, "options": s.options}
            for s in specs
        ]
        print(json.dumps(to_json(plain)))  # noqa: T201 the one document
        return
    for spec in specs:
        stdout.print(
            Text(spec.name, style="bold"), f"{spec.source}, shrinks {', '.join(spec.modules)}"
        )
        table = Table(box=None, show_header=False, padding=(0, 2))
        for option in spec.options:
            words = option.help
            if option.choices:
                words += f" (one of: {', '.join(_word(c) for c in option.choices)})"
            table.add_row(f"{option.name}={_word(option.default)}", words)
        stdout.print(table)
    stdout.print("set one with --option KEY=VALUE; shown are the defaults")


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
