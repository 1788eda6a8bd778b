"""The result of a run on the terminal: the verdict, before and after, and what to do next."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.report import bits, summary, training
from orchestrator.report.document import Document, section
from orchestrator.report.document import rows as rows_of
from orchestrator.report.numbers import NBSP
from orchestrator.report.serving import takers

TONES = {"good": "green", "cost": "yellow", "bad": "red", "": "default"}


def render_terminal(report: Document) -> RenderableType:
    """Return a compact summary of the report for a rich console."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("", min_width=10)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.comparisons(report):
        table.add_row(
            _plain(row.name),
            _plain(row.before),
            Text(_printable(row.after), style="bold"),
            Text(_printable(row.change), style=TONES[row.tone]),
        )
    colour = TONES[summary.tone(report)]
    verdict = f" {_printable(summary.verdict(report))} "
    head = Text.assemble((verdict, f"bold reverse {colour}"), "  ")
    head.append(_printable(summary.title(report)), style="bold")
    slower = summary.slower(report)
    if slower:
        head.append(f" \u00b7 {slower}", style=f"bold {TONES['cost']}")
    quality = summary.quality_note(report)
    notes = (
        summary.asked,
        summary.promise,
        bits.bits_note,
        bits.damped_note,
        summary.served,
        summary.measured_on,
        summary.statistics_note,
        summary.makers_note,
        summary.refit_note,
        training.recovery_note,
        summary.memory_note,
        summary.throughput_note,
        summary.kernels_note,
    )
    small = [note(report) for note in notes]
    return Group(
        head,
        _plain(summary.sentence(report)),
        *([Text(_printable(quality), style=colour)] if quality else []),
        *(Text(_printable(f"  try {each}"), style=colour) for each in summary.advice(report)),
        *_slower(summary.slower_because(report)),
        Text(),
        table,
        Text(),
        *(Text(_printable(line), style="dim") for line in small if line),
        *_places(report),
    )


def _slower(because: Sequence[str]) -> list[Text]:
    lines = ["Why it is slower, as far as is known:", *(f"  {each}" for each in because)]
    return [Text(_printable(line), style=TONES["cost"]) for line in lines] if because else []


def _places(report: Document) -> list[Text]:
    path = summary.checkpoint_path(report)
    page = f"{path.removesuffix('/model')}/report.html"
    rows = [("checkpoint", path), ("report", page)]
    if summary.is_ready(report):
        versions = section(report, "environment")
        needs = [f"{n} {versions[n]}" for n in summary.loads_with(report) if versions.get(n)]
        tested = f"  # {', '.join(needs)}" if needs else ""
        rows.append(("load", summary.loading_call(report, repr(path)) + tested))
        served = takers(rows_of(report, "serving"))
        rows += [("served by", f"{served}; commands in {path}/README.md")] if served else []
    # Wrapped by the terminal, so that copied text has no line breaks.
    return [
        Text.assemble((f"{name:<12}", "dim"), _printable(value), no_wrap=True, overflow="ignore")
        for name, value in rows
    ]


def _plain(text: str) -> Text:
    return Text(_printable(text))


def _printable(text: str) -> str:
    """Return the text without control characters."""
    return "".join(c if c.isprintable() or c == NBSP else "\ufffd" for c in text)
