"""Prints what was found wrong: a table for people, JSON for machines, an exit code for scripts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from orchestrator.cli.output import stdout
from orchestrator.lint.cluster_file import Finding
from orchestrator.recipe import presets as shipped
from planners.errors import ClusterError, ConfigError, DataError

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def cluster_file(path: str, *, json_: bool) -> None:
    """Print the findings of a cluster file.

    Raises:
        ConfigError: it has errors, or cannot be read.
    """
    from orchestrator.lint.cluster import lint  # imports Ray's launcher

    found = lint(path)
    if json_:
        print(json.dumps({"file": path, "findings": [asdict(f) for f in found]}))  # noqa: T201 the one document
    else:
        for finding in found:
            _print_finding(path, finding)
    errors = sum(finding.level == "error" for finding in found)
    if not json_:
        stdout.print(_counts(found) if found else f"{path}: nothing found")
    if errors and not json_:
        raise ConfigError(f"{path}: {errors} error" + ("s" if errors > 1 else ""))
    if errors:
        raise SystemExit(ConfigError.exit_code)


def recipes(*, json_: bool) -> None:
    """Print the recipes that come with the package."""
    found = shipped.available()
    if json_:
        print(json.dumps({"recipes": found}))  # noqa: T201 the one document
        return
    table = Table.grid(padding=(0, 2))
    for name, purpose in found.items():
        table.add_row(Text(name, style="bold"), purpose)
    stdout.print(table)
    stdout.print(
        Text("compress-cluster run MODEL -r NAME takes one; recipes show NAME prints it", "dim")
    )


def machine(out: str, *, offline: bool, json_: bool) -> None:
    """Print what is wrong with this machine.

    Raises:
        SystemExit: something is; with the exit code of a cluster that does not fit.
    """
    from orchestrator.lint.machine import examine  # imports torch

    checks = examine(out, offline=offline)
    if json_:
        print(json.dumps({"checks": [asdict(check) for check in checks]}))  # noqa: T201 the one document
    for check in checks if not json_ else ():
        head = Text.assemble((f"{check.level:<8}", COLOURS[check.level]), (check.name, "bold"))
        stdout.print(head, check.said, soft_wrap=True)
        if check.fix:
            stdout.print(Text(f"        {check.fix}", style="dim"), soft_wrap=True)
    if any(check.level == "error" for check in checks):
        raise SystemExit(ClusterError.exit_code)


def texts(
    sources: Sequence[str], *, evaluation: str, model: str, sequence_length: int, json_: bool
) -> None:
    """Print what text sources hold and how much of each is wrong.

    Raises:
        DataError: a share is over its limit.
    """
    from orchestrator.lint.texts import lint_texts

    found = [
        lint_texts(source, evaluation=evaluation, model=model, sequence_length=sequence_length)
        for source in sources
    ]
    documents = [{**each, "measures": [asdict(m) for m in each["measures"]]} for each in found]
    if json_:
        print(json.dumps(documents[0] if len(found) == 1 else {"sources": documents}))  # noqa: T201 the one document
    else:
        for each in found:
            _print_text(each)
        _print_shares(found)
    wrong = [
        f"{each['source']}: over the limit: {', '.join(names)}"
        for each in found
        if (names := [m.name for m in each["measures"] if m.level == "error"])
    ]
    if wrong and json_:
        raise SystemExit(DataError.exit_code)
    if wrong:
        raise DataError("; ".join(wrong))


def _print_text(found: Mapping[str, Any]) -> None:
    from orchestrator.lint.texts import LIMITS

    for key, value in found.items():
        if key != "measures":
            stdout.print(
                Text(f"{key.replace('_', ' ')} ", style="dim"), _said(value), soft_wrap=True
            )
    for m in found["measures"]:
        warn, fail = LIMITS[m.name]
        head = Text.assemble((f"{m.level:<8}", COLOURS[m.level]), (m.name, "bold"))
        limits = f"(warns from {warn:.2%}, fails from {fail:.0%})"
        stdout.print(head, f"{m.share:.2%} {m.meaning} {limits}", soft_wrap=True)
        if m.fix:
            stdout.print(Text(f"        {m.fix}", style="dim"), soft_wrap=True)


def _print_shares(found: Sequence[Mapping[str, Any]]) -> None:
    """Print how much of all that is each source's, where there are several."""
    unit = "tokens" if "tokens" in found[0] else "characters"
    total = max(1, sum(each[unit] for each in found))
    for each in found if len(found) > 1 else ():
        share = f"{each[unit] / total:>6.1%} of the {unit}, {each[unit]:,}"
        stdout.print(Text(each["source"], style="bold"), share, soft_wrap=True)


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(each)}" for key, each in value.items())
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _print_finding(path: str, finding: Finding) -> None:
    where = f"{path}:{finding.line}"
    head = Text.assemble(
        (finding.level, COLOURS[finding.level]), f" {where} ", (finding.path, "bold")
    )
    stdout.print(head, soft_wrap=True)
    stdout.print(f"  {finding.why}", soft_wrap=True)
    stdout.print(Text(f"  fix: {finding.fix}", style="dim"), soft_wrap=True)


def _counts(found: Sequence[Finding]) -> str:
    levels = [finding.level for finding in found]
    said = [(levels.count(level), level) for level in ("error", "warning", "note")]
    return ", ".join(f"{n} {level}" + ("s" if n > 1 else "") for n, level in said if n)
