"""Printing for `compress-cluster diff`: results first; with --details every difference."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from actors.storage.files import Directory
from orchestrator.cli.output import emit, stdout
from orchestrator.report import summary
from orchestrator.report.document import Document
from orchestrator.report.terminal import TONES
from orchestrator.rundir.compare import Difference, differences
from orchestrator.rundir.finished import finished_report

UNTIL = 4  # names in a line; of more, how many
OPTIONS = "options."


def diff(run_a: str, run_b: str, *, details: bool, json_: bool) -> None:
    """Print how two runs differ: the results and the recipe, or everything."""
    uris = (run_a, run_b)
    a, b = map(Directory, uris)
    found = differences(a, b)
    sections = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    reports = [finished_report(run) or {} for run in (a, b)]
    document = {"a": run_a, "b": run_b, **sections}
    emit(document, lambda: _print(uris, reports, found, details=details), json_=json_)


def _print(
    uris: Sequence[str],
    reports: Sequence[Document],
    found: dict[str, list[Difference]],
    *,
    details: bool,
) -> None:
    for letter, uri, report in zip("AB", uris, reports, strict=True):
        said = summary.title(report) if report else "not finished"
        stdout.print(Text(letter, style="bold"), summary.verdict(report), uri, said, soft_wrap=True)
        if note := summary.quality_note(report):
            stdout.print(" ", Text(note, style=TONES[summary.tone(report)]), soft_wrap=True)
    _print_results(reports)
    if details:
        _print_all(found)
        return
    _print_recipe(found["recipe"])
    for name in ("data", "versions", "layers"):
        stdout.print(Text(f"{name:<9}", style="bold"), _names([row.what for row in found[name]]))
    if any(found.values()):
        stdout.print("--details shows every difference", style="dim")


def _print_results(reports: Sequence[Document]) -> None:
    rows = summary.side_by_side(*reports)
    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    table.add_column("")
    for name in ("A", "B", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, row.before, row.after, row.change)
    stdout.print(table)


def _print_recipe(rows: list[Difference]) -> None:
    """Print the keys that differ; of options that only one method has, only the names."""
    if not rows:
        stdout.print(Text("recipe   ", style="bold"), "the same")
        return
    methods = {row.what for row in rows} & {"method", "steps"}
    own = [r for r in rows if methods and r.what.startswith(OPTIONS) and None in (r.a, r.b)]
    _print_table("recipe", [row for row in rows if row not in own])
    for letter, other in (("A", "b"), ("B", "a")):
        names = [row.what.removeprefix(OPTIONS) for row in own if getattr(row, other) is None]
        if names:
            stdout.print(f"options that only the method of {letter} has: {', '.join(names)}")


def _print_all(found: dict[str, list[Difference]]) -> None:
    for name, rows in found.items():
        if rows:
            _print_table(name, rows)
        else:
            stdout.print(Text(name, style="bold"), "the same")


def _print_table(title: str, rows: list[Difference]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
                  padding=(0, 2), header_style="dim")  # fmt: skip
    for column in ("", "A", "B"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.what, _told(row.a), _told(row.b))
    stdout.print(table)


def _names(names: list[str]) -> str:
    """Return what differs in a few words."""
    if not names:
        return "the same"
    whole = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"differ: {', '.join(whole)}" if len(whole) <= UNTIL else f"{len(whole)} differ"


def _told(value: object) -> str:
    if value in (None, ""):
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
