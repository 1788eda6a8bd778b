"""The result file that every benchmark leaves: what was measured, where, and was the goal met."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "transformers", "ray", "numpy", "safetensors", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One promise and whether this measurement kept it."""

    text: str
    measured: str
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one benchmark found.

    Attributes:
        claim: the script's name, which names the file.
        method: how it was measured, in a few sentences.
        configuration: everything that a repetition must set.
        tables: title -> Markdown table.
        goals: what was to be shown.
        notes: what else a reader should know.
        load: `load_average` before the measurement.
    """

    claim: str
    method: str
    configuration: Mapping[str, object]
    tables: Mapping[str, str]
    goals: Sequence[Goal]
    notes: Sequence[str] = field(default=())
    load: str


def load_average() -> str:
    """Return the load of this machine over 1, 5 and 15 minutes, to see what else ran."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table, aligned to be read as text too; numbers come as text."""
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [padded[0], rule, *padded[1:]])


def report(result: Result, *, keep: bool) -> None:
    """Print a result, and where ``keep`` write it to ``benchmarks/results/``."""
    text = _markdown(result)
    print(text)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{result.claim}_{_hardware_slug()}_{time.strftime('%Y%m%d')}.md"
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    else:
        print("not written: a quick run shows that the script works, its numbers mean nothing")


def _markdown(result: Result) -> str:
    verdict = "met" if all(goal.met for goal in result.goals) else "NOT met"
    goals = [
        f"- {goal.text}: **{goal.measured}** ({'met' if goal.met else 'NOT met'})"
        for goal in result.goals
    ]
    tables = [f"{title}\n\n{rows}\n" for title, rows in result.tables.items()]
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "load average (1, 5, 15 min) before and after": f"{result.load} / {load_average()}",
        "versions": versions(),
        "commit": commit(),
    }
    sections = [
        f"# {result.claim}: goal {verdict}",
        "\n".join(goals),
        "## Measured",
        *tables,
        "\n".join(f"- {note}" for note in result.notes),
        "## Method",
        result.method,
        "## Where",
        table(("", ""), list(facts.items())),
        "## Configuration",
        table(("", ""), list(result.configuration.items())),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def hardware() -> str:
    """Return processor, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _hardware_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{_cpu()} {os.cpu_count()}-core".lower()).strip("-")


def versions() -> str:
    """Return the versions that matter."""
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return f"Python {platform.python_version()}, {libraries}"


def commit() -> str:
    """Return the commit that is checked out, and whether files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "HEAD") or "unknown"
    # The results themselves are what is new after a measurement.
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{head}{' and changes on top' if changed else ''}"
