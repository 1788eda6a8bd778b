"""What was planned beside what it was: seconds by phase and bytes of a worker."""

from dataclasses import dataclass

from orchestrator.report import numbers
from orchestrator.report.document import Document, section


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """One thing that was planned.

    Attributes:
        what: a phase, all of them, or the worker's memory.
        planned: the median of the simulated runs.
        between: what one run in ten stays below, and nine in ten; empty where nothing was drawn.
        actual: what it was.
        change: actual over planned, as people read it.
    """

    what: str
    planned: str
    between: str
    actual: str
    change: str


def expectations(report: Document) -> list[Expectation]:
    """Return what can be compared; nothing where nothing was planned."""
    forecast, seconds = section(report, "plan", "forecast"), section(report, "seconds")
    phases = section(forecast, "phases")
    planned = {name: section(phases, name) for name in phases}
    if forecast.get("seconds"):
        planned["total"] = section(forecast, "seconds")
    rows = [
        Expectation(
            what=name,
            planned=numbers.seconds_text(each.get("p50")),
            between=numbers.between(
                numbers.seconds_text(each.get("p10")), numbers.seconds_text(each.get("p90"))
            ),
            actual=numbers.seconds_text(seconds.get(name)),
            change=numbers.change(numbers.quotient(seconds.get(name), each.get("p50"))),
        )
        for name, each in planned.items()
        if numbers.number(seconds.get(name)) is not None
    ]
    memory = section(report, "memory")
    held, peak = memory.get("planned_worker_bytes"), memory.get("worker_peak_bytes")
    if rows and held and peak:  # no peak is what a driver reports that found all work done
        rows.append(
            Expectation(
                what="memory of a worker",
                planned=numbers.bytes_text(held),
                between="",
                actual=numbers.bytes_text(peak),
                change=numbers.change(numbers.quotient(peak, held)),
            )
        )
    return rows


def source(report: Document) -> str:
    """Return in words where the planned times are from."""
    return str(section(report, "plan", "forecast").get("source") or "")
