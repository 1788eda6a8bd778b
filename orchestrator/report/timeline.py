"""The timeline plot: the work of each worker over time, and the events of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from orchestrator.report.document import Event, Span, natural
from orchestrator.report.numbers import counted, percent, seconds_text
from orchestrator.report.svg import KIND_COLOURS, Panel, Plot, Sheet, Words, draw, label, ticks
from planners.units.kinds import KINDS

MAX_WORKERS = 48
MAX_BARS = 1500

_OTHER = 9  # the colour of what is no kind of unit
_ROW = 0.7
_FEW_WORKERS = 16
_PIXEL = 1.0 / 800.0
_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_MIN_LENGTH = 5.0
_NUMBERS_APART = 0.05


def workers(spans: Sequence[Span], events: Sequence[Event]) -> Plot | None:
    """Return the work of every worker over time, coloured by kind, events numbered above."""
    if not spans:
        return None
    names = sorted({span.worker for span in spans}, key=natural)
    shown = names[:MAX_WORKERS]
    total = max([span.end for span in spans] + [event.at for event in events])
    first = min(0.0, min(span.start for span in spans))
    bars = merged([span for span in spans if span.worker in set(shown)], total - first)
    busy = busy_fraction(spans)
    limit = f" The first {len(shown)} of {len(names)} workers are shown." if names != shown else ""
    unit, length = _unit(total)
    words = Words(
        key="timeline",
        title="Timeline of workers",
        description=f"{counted(len(names), 'worker')} did {counted(len(spans), 'unit')} of work in "
        f"{seconds_text(total)}; {counted(len(events), 'event')}.{limit}",
        caption=f"{unit.capitalize()} since the run began. Between their first and last unit of "
        f"work, workers were busy {percent(busy, digits=0)} of the time.{limit}"
        + (" Numbered lines are the events below." if events else ""),
        legend=tuple((name, KIND_COLOURS[slot], "box") for slot, name in _slots(spans)),
    )

    def paint(sheet: Sheet) -> None:
        panel = sheet.panel()
        row = {name: len(shown) - 1 - position for position, name in enumerate(shown)}
        panel.x_limits = (first / length, max(total, first + 1e-3) / length)
        panel.y_limits = (-0.6, len(shown) - 0.4)
        panel.x_ticks = [
            (x, f"{x:.6g}") for x in ticks(panel.x_limits, most=5 if sheet.narrow else 9)
        ]
        panel.y_ticks = [(row[name], label(name)) for name in shown]
        panel.x_label, panel.grid, panel.axis = unit, "x", False
        _bars(panel, bars, row, length)
        _marks(panel, [event.at / length for event in events])

    row_inches = 0.28 if len(shown) <= _FEW_WORKERS else 0.18
    return draw(words, paint, height=lambda _: 0.85 + len(shown) * row_inches)


def _bars(panel: Panel, bars: Sequence[Span], row: Mapping[str, int], length: float) -> None:
    """Draw each bar in its worker's row; the shortest is as wide as a line, so that it is seen."""
    least = (panel.x_limits[1] - panel.x_limits[0]) * _PIXEL
    for bar in sorted(bars, key=_place):
        middle, begin = row[bar.worker], bar.start / length
        x = (begin, max(bar.end / length, begin + least))
        panel.box(x, (middle - _ROW / 2, middle + _ROW / 2), KIND_COLOURS[slot_of(bar.kind)])


def _marks(panel: Panel, moments: Sequence[float]) -> None:
    """Draw a line at each moment and its number above, where numbers do not touch."""
    apart = (panel.x_limits[1] - panel.x_limits[0]) * _NUMBERS_APART
    numbered = float("-inf")
    for position, moment in enumerate(moments, start=1):
        panel.upright(moment)
        if moment - numbered < apart:
            continue
        numbered = moment
        panel.above.append((moment, str(position)))


def merged(spans: Sequence[Span], total: float) -> list[Span]:
    """Return at most ``MAX_BARS`` bars: neighbours of one kind that no eye can part are one."""
    gap = total * _PIXEL
    bars = _joined(spans, gap)
    while len(bars) > MAX_BARS and gap < total:
        gap *= 2.0
        bars = _joined(spans, gap)
    return bars


def by_kind(spans: Sequence[Span]) -> list[tuple[str, int, float]]:
    """Return (kind, number of units, seconds of all workers), in the order of the legend."""
    found = []
    for kind in sorted({span.kind for span in spans}, key=lambda kind: (slot_of(kind), kind)):
        mine = [span for span in spans if span.kind == kind]
        found.append((kind, len(mine), sum(span.end - span.start for span in mine)))
    return found


def busy_fraction(spans: Sequence[Span]) -> float:
    """Return the fraction of time that workers were busy between their first and last unit."""
    busy = there = 0.0
    for _, group in groupby(sorted(spans, key=lambda s: (s.worker, s.start)), lambda s: s.worker):
        mine = list(group)
        reached = mine[0].start
        for span in mine:
            busy += max(0.0, span.end - max(span.start, reached))
            reached = max(reached, span.end)
        there += reached - mine[0].start
    return busy / there if there else 1.0


def slot_of(kind: str) -> int:
    """Return which colour a kind of work has; parts of a training have that of the whole."""
    kind = "recover_model" if kind == "training" else kind
    return KINDS[kind].colour if kind in KINDS else _OTHER


def _unit(total: float) -> tuple[str, float]:
    """Return the largest unit of time that the run took several of, and its seconds."""
    fitting = (unit for unit in _UNITS if total >= _MIN_LENGTH * unit[1])
    return next(fitting, _UNITS[-1])


def _slots(spans: Sequence[Span]) -> list[tuple[int, str]]:
    kinds = {span.kind for span in spans}
    used = sorted({slot_of(kind) for kind in kinds})
    return [(slot, _slot_name(slot, kinds)) for slot in used]


def _slot_name(slot: int, kinds: set[str]) -> str:
    return ", ".join(sorted({_short(kind) for kind in kinds if slot_of(kind) == slot}))


def _short(kind: str) -> str:
    """Return what a kind of copies is called, whichever part of the weights they are of."""
    verb, _, part = kind.partition("_")
    return verb if verb in ("export", "kept") and part else kind


def _place(bar: Span) -> tuple[int, str]:
    return slot_of(bar.kind), bar.worker


def _same(one: Span, other: Span) -> bool:
    return (one.worker, one.kind) == (other.worker, other.kind)


def _joined(spans: Sequence[Span], gap: float) -> list[Span]:
    bars: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.worker, s.kind, s.start)):
        last = bars[-1] if bars else None
        if last and _same(last, span) and span.start - last.end <= gap:
            bars[-1] = replace(last, end=max(last.end, span.end))
        else:
            bars.append(span)
    return bars
