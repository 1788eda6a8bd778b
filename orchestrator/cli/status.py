"""Commands that only read a run: no library that takes seconds to import is needed."""

import json
import shlex
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict
from itertools import takewhile
from typing import Any

from rich.table import Table
from rich.text import Text

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.cli.output import emit, stdout
from orchestrator.report import render_page, render_terminal
from orchestrator.report.quality import Quality, quality
from orchestrator.report.terminal import TONES
from orchestrator.rundir import lease
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.layout import JOB, READY, REPORT
from planners.errors import StorageError
from planners.units.kinds import layer_of


def report(run_uri: str, *, json_: bool) -> None:
    """Print the report of a finished run, and rewrite its page."""
    run_ = Directory(run_uri)
    found = _finished(run_)
    run_.write("report.html", render_page(found).encode())
    print_report(found, json_=json_)


def status(run_uri: str, *, json_: bool) -> None:
    """Print how many units of each kind are done, and which driver holds the run."""
    run_ = Directory(run_uri)
    job = _job(run_)
    if run_.size("plan.json") is None and job is None:
        raise StorageError(f"{run_uri}: there is no run here", hint="give the --out of a run")
    units, steps = read_records(run_), _steps_done(run_)
    done = Counter(map(_without_number, units))
    holder = lease.holder(run_)
    alive = holder is not None and not lease.is_dead(holder)
    verdict = "READY" if run_.size(READY) is not None else "running" if alive else "stopped"
    read = quality(finished_report(run_) or {}) if verdict == "READY" else None
    document = {
        "run": run_uri,
        "verdict": verdict,
        "quality": None if read is None else asdict(read),
        "done": dict(sorted(done.items())),
        **({"steps": steps} if steps else {}),
        "holder": holder if alive else None,
        "job": job,
    }

    def show() -> None:
        stdout.print(Text(verdict, style="bold"), run_uri, soft_wrap=True)
        _print_quality_and_job(read, job)
        _print_steps(steps)
        _print_units(units, _num_layers(run_))
        _print_holder(holder if alive else None, run_, verdict)

    emit(document, show, json_=json_)


def _print_units(units: Collection[str], num_layers: int) -> None:
    done = Counter(map(_without_number, units))
    of_layers = {_without_number(unit) for unit in units if layer_of(unit) is not None}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("units")
    table.add_column("done", justify="right")
    for kind, count in sorted(done.items()):
        of = f" of {num_layers}" if num_layers and kind in of_layers else ""
        table.add_row(kind, f"{count}{of}")
    stdout.print(table if done else "no unit of work is done")


def _print_holder(holder: Mapping[str, Any] | None, run_: Directory, verdict: str) -> None:
    if holder is not None:
        since = time.strftime("%H:%M:%S", time.localtime(holder["since"]))
        stdout.print(f"held by process {holder['pid']} on {holder['host']} since {since}")
    elif verdict != "READY" and run_.is_local:
        resume = shlex.join(["compress-cluster", "run", "-r", run_.path("run.yaml")])
        stdout.print(f"no driver is running; to resume: {resume}", soft_wrap=True)
    elif verdict != "READY":
        stdout.print("no driver is running; the command that started the run resumes it")


def _print_quality_and_job(read: Quality | None, job: dict[str, Any] | None) -> None:
    if read is not None:
        stdout.print(Text(f"quality: {read.word}", style=TONES[read.tone]))
    if job is not None:
        said = f"job {job['submission_id']} at {job['address']}: {job['state']}"
        stdout.print(said, soft_wrap=True)


def _finished(run_: Directory) -> dict[str, Any]:
    found = finished_report(run_)
    if found is None:
        raise StorageError(
            f"{run_.uri}: has no finished run ({READY} and {REPORT})",
            hint=f"compress-cluster status {run_.uri} shows its progress",
        )
    return found


def _job(run_: Directory) -> dict[str, Any] | None:
    """Return the job of a run and its state, or None if it was not submitted."""
    if run_.size(JOB) is None:
        return None
    from orchestrator.remote import submission  # what asks a cluster takes longer to import

    return submission.described(run_)


def _num_layers(run_: Directory) -> int:
    try:
        return int(json.loads(run_.read("plan.json"))["plan"]["shape"]["num_layers"])
    except (ValueError, LookupError, TypeError, StorageError):
        return 0  # not begun; or torn by a crash, and the run writes it again


def _print_steps(steps: list[dict[str, Any]]) -> None:
    for number, step in enumerate(steps, start=1):
        said = "done" if step["done"].get("step") else f"{sum(step['done'].values())} units done"
        stdout.print(f"step {number}, {step['method']}: {said}")


def _steps_done(run_: Directory) -> list[dict[str, Any]]:
    """Return method and finished units of every step, for a run of several steps."""
    try:
        asked = json.loads(run_.read("plan.json"))["identity"].get("steps", [])
        names = [str(step["method"]) for step in asked]
    except (ValueError, LookupError, TypeError, AttributeError, StorageError):
        return []  # not begun; or torn by a crash, and the run writes it again
    folders = [run_.below(f"steps/{n}-{name}") for n, name in enumerate(names[:-1], start=1)]
    found = [*map(Directory, folders), run_]
    return [
        {
            "method": name,
            "done": dict(sorted(Counter(map(_without_number, read_records(each))).items())),
        }
        for name, each in zip(names, found, strict=False)
    ]


def _without_number(unit: str) -> str:
    """Return the name of a unit without its number: ``evaluation-dense``, ``basis``."""
    every = unit.split("-")
    words = list(takewhile(lambda word: not word.isdigit(), every))
    return "-".join(words[:-1] or words) if words != every else unit  # ``export-head``: no number


def print_report(found: dict[str, Any], *, json_: bool) -> None:
    """Print a report: the JSON document, or a summary for people."""
    emit(found, lambda: stdout.print(render_terminal(found), crop=False), json_=json_)
