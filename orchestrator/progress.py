"""What a person sees while a run goes on: one live line a phase, or plain log lines."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orchestrator.journal import Event

LOG_SECONDS = 5.0  # between two lines of a phase where there is no terminal
UNITS_OF = {
    "calibrate": ("calibrate",),
    "evaluate": ("evaluate",),
    "allocate": ("damage",),
    "compress": ("basis", "basis_shared", "layer", "embedding", "head"),
    "stitch": ("stitch",),
    "verify": ("verify",),
    "throughput": ("throughput",),
}
TROUBLE = ("worker lost", "preempted", "out of memory")


class ProgressScreen:
    """Follows the events of a run; a context manager, because a live screen must be taken down."""

    def __init__(self, console: Console, *, num_workers: int) -> None:
        self._console = console
        self._num_workers = num_workers
        self._phase, self._total, self._done, self._tokens = "", 0, 0, 0
        self._begun, self._last_line = time.monotonic(), 0.0
        self._task: TaskID | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ProgressScreen":
        """Start the live display."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the live display down."""
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "phase begins":
            self._begin(event)
        elif kind == "phase ends":
            self._end(event)
        elif kind in UNITS_OF.get(self._phase, ()):
            self._advance(event)
        elif kind in TROUBLE:
            self._console.print(f"[yellow]{kind}[/]: {event['detail']}; its work goes on elsewhere")

    def _begin(self, event: Event) -> None:
        if event["unit"] == "run" or not event["tokens"]:
            return
        self._phase, self._total = event["unit"], event["tokens"]
        self._done, self._tokens, self._begun = 0, 0, time.monotonic()
        self._task = self._progress.add_task(self._phase, total=self._total, rate="")

    def _advance(self, event: Event) -> None:
        self._done += 1
        self._tokens += event["tokens"]
        seconds = max(time.monotonic() - self._begun, 1e-6)
        workers = f"{self._num_workers} worker" + ("s" if self._num_workers > 1 else "")
        rate = f"{self._tokens / seconds:,.0f} tok/s · {workers}" if self._tokens else workers
        if self._task is not None:
            self._progress.update(self._task, completed=self._done, rate=rate)
        if not self._console.is_terminal and time.monotonic() - self._last_line > LOG_SECONDS:
            self._last_line = time.monotonic()
            left = seconds / self._done * (self._total - self._done)
            self._console.print(
                f"{self._phase}: {self._done}/{self._total}, {rate}, about {left:.0f} s left"
            )

    def _end(self, event: Event) -> None:
        if event["unit"] == self._phase and not self._console.is_terminal:
            self._console.print(f"{self._phase}: done in {event['seconds']:.1f} s")
        if event["unit"] == self._phase:
            self._phase, self._task = "", None


def quiet(event: dict[str, Any]) -> None:
    """Show nothing."""
    del event
