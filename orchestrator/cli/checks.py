"""Checks before a run: of this machine, a text, a cluster file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from orchestrator.cli import completion
from orchestrator.cli.options import as_json
from orchestrator.cli.output import emit, stdout
from planners.errors import ClusterError, ConfigError, DataError

if TYPE_CHECKING:  # imports that take long are inside each check
    from orchestrator.lint.cluster_file import Finding
    from orchestrator.lint.machine import Check

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


@click.group()
def cluster() -> None:
    """Check a cluster file before renting machines."""


@cluster.command("lint")
@click.argument("file", metavar="FILE", shell_complete=completion.files)
@as_json
def cluster_lint(file: str, json_: bool) -> None:
    """Find errors in a cluster file that Ray and SkyPilot accept.

    \b
    compress-cluster cluster lint cluster.yaml
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.lint.cluster import lint

    found = lint(file)
    document = {"file": file, "findings": [asdict(f) for f in found]}
    emit(document, lambda: _print_findings(file, found), json_=json_)
    errors = sum(finding.level == "error" for finding in found)
    if errors and not json_:
        raise ConfigError(f"{file}: {errors} error" + ("s" if errors > 1 else ""))
    if errors:
        raise SystemExit(ConfigError.exit_code)


@click.command()
@click.option(
    "--out", default="runs", show_default=True, help="Run directory, or a folder of them."
)
@click.option("--offline", is_flag=True, help="Make no network requests.")
@as_json
def doctor(out: str, offline: bool, json_: bool) -> None:
    """Check this machine before a run.

    \b
    compress-cluster doctor --out s3://BUCKET/runs
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.lint.machine import examine

    found = examine(out, offline=offline)
    document = {"checks": [asdict(check) for check in found]}
    emit(document, lambda: _print_checks(found), json_=json_)
    if any(check.level == "error" for check in found):
        raise SystemExit(ClusterError.exit_code)


@click.group()
def data() -> None:
    """Check a text before calibrating with it."""


@data.command("lint")
@click.argument(
    "sources", metavar="SRC...", nargs=-1, required=True, shell_complete=completion.files
)
@click.option("--evaluation", default="", metavar="SRC", help="Text that must not be in SRC.")
@click.option("--model", default="", metavar="MODEL", help="Count its tokens too.")
@click.option("--sequence-length", default=256, show_default=True, help="Tokens of a sequence.")
@as_json
def data_lint(sources: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Report duplicate, broken and short texts, and overlap with the evaluation data.

    For several sources, also report the share of the tokens, or characters, that each one has.

    \b
    compress-cluster data lint train.jsonl --evaluation held-out.jsonl
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.lint.texts import lint_texts

    found = [lint_texts(source, **given) for source in sources]
    documents = [{**each, "measures": [asdict(m) for m in each["measures"]]} for each in found]
    document = documents[0] if len(found) == 1 else {"sources": documents}
    emit(document, lambda: _print_texts(found), json_=json_)
    wrong = [
        f"{each['source']}: over the limit: {', '.join(names)}"
        for each in found
        if (names := [m.name for m in each["measures"] if m.level == "error"])
    ]
    if wrong and json_:
        raise SystemExit(DataError.exit_code)
    if wrong:
        raise DataError("; ".join(wrong))


def _print_checks(found: Sequence["Check"]) -> None:
    for check in found:
        _print_line(check.level, check.name, check.said, check.fix)


def _print_line(level: str, name: str, said: str, fix: str) -> None:
    head = Text.assemble((f"{level:<8}", COLOURS[level]), (name, "bold"))
    stdout.print(head, said, soft_wrap=True)
    if fix:
        stdout.print(Text(f"        {fix}", style="dim"), soft_wrap=True)


def _print_texts(found: Sequence[Mapping[str, Any]]) -> None:
    for each in found:
        _print_text(each)
    _print_shares(found)


def _print_text(found: Mapping[str, Any]) -> None:
    from orchestrator.lint.texts import LIMITS

    for key, value in found.items():
        if key != "measures":
            stdout.print(
                Text(f"{key.replace('_', ' ')} ", style="dim"), _said(value), soft_wrap=True
            )
    for m in found["measures"]:
        warn, fail = LIMITS[m.name]
        limits = f"(warns from {warn:.2%}, fails from {fail:.0%})"
        _print_line(m.level, m.name, f"{m.share:.2%} {m.meaning} {limits}", m.fix)


def _print_shares(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the share of each source, if there are several."""
    unit = "tokens" if "tokens" in found[0] else "characters"
    total = max(1, sum(each[unit] for each in found))
    for each in found if len(found) > 1 else ():
        share = f"{each[unit] / total:>6.1%} of the {unit}, {each[unit]:,}"
        stdout.print(Text(each["source"], style="bold"), share, soft_wrap=True)


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(each)}" for key, each in value.items())
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _print_findings(path: str, found: Sequence["Finding"]) -> None:
    for finding in found:
        level, where = finding.level, f" {path}:{finding.line} "
        head = Text.assemble((level, COLOURS[level]), where, (finding.path, "bold"))
        stdout.print(head, soft_wrap=True)
        stdout.print(f"  {finding.why}", soft_wrap=True)
        stdout.print(Text(f"  fix: {finding.fix}", style="dim"), soft_wrap=True)
    levels = [finding.level for finding in found]
    said = [(levels.count(level), level) for level in ("error", "warning", "note")]
    counts = [f"{n} {level}" + ("s" if n > 1 else "") for n, level in said if n]
    stdout.print(", ".join(counts) or f"{path}: no findings")


ALL = (cluster, doctor, data)
