"""Show a snapshot as a screen, and as log lines."""

import time
from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.engine.failure_policy import TROUBLE
from orchestrator.remote.snapshot import Snapshot
from orchestrator.remote.time_left import Phase
from orchestrator.report.numbers import bytes_text, seconds_text
from orchestrator.report.over_plan import over_plan
from orchestrator.report.sparkline import sparkline
from orchestrator.report.terminal import TONES
from orchestrator.rundir.journal import Event
from planners.units.kinds import DONE, KINDS, MEASURED, PHASES, STATES, SUMMED, WAITING

CELLS = {  # a letter too: some people cannot tell the colours apart
    WAITING: ("·", "bright_black"),
    SUMMED: ("s", "black on cyan"),
    MEASURED: ("m", "black on yellow"),
    DONE: ("█", "green"),
}
VERDICTS = {"READY": "bold green", "running": "bold cyan", "stopped": "bold red"}
ROW = 40  # layers in a row of the grid, at most
MAX_WORKERS = 12
CURVE = 32  # letters of a curve of losses, at most
_TRAINED_IN = KINDS["recover_model"].phase


def screen(snapshot: Snapshot, *, price: float, now: float, width: int) -> RenderableType:
    """Return a run as a screen of ``width`` columns.

    ``price`` is per worker-hour; 0 uses the price that the run was given.
    """
    parts: list[RenderableType] = [_head(snapshot, price or snapshot.price_per_hour), Text()]
    if snapshot.phase is not None:
        parts += [_progress(snapshot.phase, now, width), *_training(snapshot, width), Text()]
    if snapshot.layers:
        parts += [_grid(snapshot, width), Text()]
    if snapshot.workers:
        parts += [_workers(snapshot, now), Text()]
    parts += [_event_line(event, width) for event in snapshot.events]
    return Group(*parts)


def lines(before: Snapshot | None, now: Snapshot) -> Iterator[str]:
    """Yield the log lines of what is new in a snapshot since the one before."""
    printed = [] if before is None else list(before.events)
    for event in now.events:
        if event not in printed:
            yield f"{_clock(event['at'])} {_words(event)}"
    known = [] if before is None else [line.partition(" ")[0] for line in _over_plan(before)]
    yield from (line for line in _over_plan(now) if line.partition(" ")[0] not in known)
    if now.phase is not None and (before is None or before.phase != now.phase):
        yield " \u00b7 ".join([_phase_words(now.phase), *_losses(now)])
    if before is None or before.verdict != now.verdict:
        yield f"{now.verdict} {now.uri}" + (f" ({now.holder})" if now.holder else "")


def _head(snapshot: Snapshot, price: float) -> RenderableType:
    facts, left = [seconds_text(snapshot.seconds)], snapshot.left
    if left is not None:
        low, middle, high = (seconds_text(each) for each in (left.p10, left.p50, left.p90))
        facts.append(f"{middle} left ({low} to {high})")
    if price:
        money = f"{snapshot.worker_hours * price:,.2f} spent"
        if left is not None:
            remaining = left.p50 / 3600 * max(1, len(snapshot.workers)) * price
            money += f", {remaining:,.2f} remaining"
        facts.append(money)
    lost = [f"{count} {kind}" for kind, count in snapshot.troubles.items()]
    colour = VERDICTS.get(snapshot.verdict, "bold")
    if snapshot.tone:
        colour = f"bold {TONES[snapshot.tone]}"
    head = Text.assemble(
        (f" {snapshot.verdict} ", f"{colour} reverse"),
        f"  {snapshot.title}",
    )
    if lost:
        head.append(f"  {', '.join(lost)}", "yellow")
    where = Text(snapshot.uri, style="dim", overflow="fold")
    if snapshot.holder:
        where.append(f"  {snapshot.holder}")
    quality = [Text(snapshot.quality, style=TONES[snapshot.tone])] if snapshot.quality else []
    return Group(head, *quality, Text(" · ".join(facts)), where)


def _progress(phase: Phase, now: float, width: int) -> RenderableType:
    """Return the progress of a phase; a pulsing bar until its first unit is done."""
    table = Table.grid(padding=(0, 1))
    bar = ProgressBar(
        total=max(1, phase.total),
        completed=phase.done,
        width=max(10, width // 4),
        pulse=not phase.done,
        animation_time=now,
    )
    elapsed = max(0.0, now - phase.begun)
    text = f"{_phase_rest(phase)} · {seconds_text(elapsed)} so far"
    if not phase.done and phase.planned:
        text += f", planned {seconds_text(phase.planned)}"
    table.add_row(Text(phase.name, style="bold"), bar, Text(text))
    words = "" if phase.done or phase.name not in PHASES else PHASES[phase.name].first_words
    return Group(table, Text(words, style="dim")) if words else table


def _losses(snapshot: Snapshot) -> list[str]:
    """Return the losses of the training and the tokens that it saw, in the phase that trains."""
    state = snapshot.training
    if state is None or snapshot.phase is None or snapshot.phase.name != _TRAINED_IN:
        return []
    return [state.text, f"{state.tokens:,} tokens"]


def _training(snapshot: Snapshot, width: int) -> list[RenderableType]:
    """Return the line of a training with the curve of its losses; none in other phases."""
    said, state = " \u00b7 ".join(_losses(snapshot)), snapshot.training
    if not said or state is None:
        return []
    line = Text.assemble(("training ", "dim"), said, no_wrap=True, overflow="ellipsis")
    room = min(CURVE, width - line.cell_len - 2)
    if room > 0:
        line.append(f"  {sparkline(state.losses, width=room)}", "cyan")
    return [line]


def _phase_rest(phase: Phase) -> str:
    parts = [f"{phase.done}/{phase.total}"]
    if phase.tokens_per_second:
        parts.append(f"{phase.tokens_per_second:,.0f} tok/s")
    if phase.seconds_left is not None:
        parts.append(f"{seconds_text(phase.seconds_left)} left in this phase")
    return " · ".join(parts)


def _phase_words(phase: Phase) -> str:
    return f"{phase.name}: {_phase_rest(phase)}"


def _grid(snapshot: Snapshot, width: int) -> RenderableType:
    label = len(str(len(snapshot.layers)))
    row = max(10, min(ROW, (width - label - 8) // 10 * 10))
    text = Text()
    for start in range(0, len(snapshot.layers), row):
        text.append(f"{'layers' if not start else '':<7}{start:>{label}} ", "dim")
        for state in snapshot.layers[start : start + row]:
            text.append(*CELLS[state])
        text.append("\n")
    counts = Counter(snapshot.layers)
    text.append(" " * (label + 8))
    for state in STATES:
        if counts[state]:
            text.append(*CELLS[state])
            text.append(f" {counts[state]} {state}   ", "dim")
    return text


def _workers(snapshot: Snapshot, now: float) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("worker", no_wrap=True)
    table.add_column("last unit", no_wrap=True, overflow="ellipsis")
    table.add_column("ago", justify="right", no_wrap=True)
    table.add_column("units", justify="right", no_wrap=True)
    table.add_column("busy", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("lost", justify="right", no_wrap=True)
    for worker in snapshot.workers[:MAX_WORKERS]:
        busy = worker.busy_seconds / snapshot.seconds if snapshot.seconds else 0.0
        table.add_row(
            worker.name,
            worker.unit,
            seconds_text(max(0.0, now - worker.at)) if snapshot.verdict == "running" else "",
            f"{worker.count:,}",
            f"{min(1.0, busy):.0%}",
            bytes_text(worker.peak_bytes) if worker.peak_bytes else "",
            Text(str(worker.lost), style="yellow") if worker.lost else "",
        )
    more = len(snapshot.workers) - MAX_WORKERS
    notes = [f"and {more} more"] if more > 0 else []
    if snapshot.device:
        notes.append(f"each on {snapshot.device}")
    if snapshot.worker_bytes:
        notes.append(f"planned memory {bytes_text(snapshot.worker_bytes)}")
    lines = [Text(line, style="yellow") for line in _over_plan(snapshot)]
    return Group(table, *([Text(" · ".join(notes), style="dim")] if notes else []), *lines)


def _over_plan(snapshot: Snapshot) -> list[str]:
    measured = {worker.name: worker.peak_bytes for worker in snapshot.workers}
    return over_plan(measured, snapshot.worker_bytes)


def _event_line(event: Event, width: int) -> RenderableType:
    text = Text(_words(event), style="yellow" if event["kind"] in TROUBLE else "", no_wrap=True)
    line = Text.assemble((f"{_clock(event['at'])} ", "dim"), text)
    line.truncate(width, overflow="ellipsis")
    return line


def _words(event: Event) -> str:
    kind, unit = event["kind"], event["unit"]
    if kind == "phase begins":
        return f"{unit} started"
    if kind == "phase ends":
        return f"{unit} done in {seconds_text(event['seconds'])}"
    detail = event["detail"].removeprefix(f"{kind}: ")
    return f"{kind} {event['worker']}: {detail}" if event["worker"] else f"{kind}: {detail}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
