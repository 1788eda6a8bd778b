"""Compare planned and measured values: seconds by phase and bytes of a worker."""

from dataclasses import dataclass

from orchestrator.report import numbers
from orchestrator.report.document import Document, section


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """A planned value and the measured one.

    Attributes:
        what: a phase, the total, or the worker's memory.
        planned: the median of the simulated runs.
        between: the 10th and 90th percentile of the simulated runs; empty if there were none.
        actual: the measured value.
        change: actual over planned, as text.
    """

    what: str
    planned: str
    between: str
    actual: str
    change: str


def expectations(report: Document) -> list[Expectation]:
    """Return all values that were both planned and measured."""
    forecast, seconds = section(report, "plan", "forecast"), section(report, "seconds")
    phases = section(forecast, "phases")
    planned = {name: section(phases, name) for name in phases}
    if forecast.get("seconds"):
        # A forecast begins with the first phase: what came before is in nobody's plan.
        seconds = {**seconds, "total": sum(numbers.number(seconds.get(p)) or 0.0 for p in phases)}
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
    if rows and held and peak:  # a driver that found all work done reports no peak
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
    """Return the source of the planned times as text."""
    return str(section(report, "plan", "forecast").get("source") or "")
