"""The progress of a run: one live line per phase, or plain log lines."""

import time

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
from rich.text import Text

from orchestrator.engine.failure_policy import RECOVERY_TEXT
from orchestrator.report.sparkline import sparkline
from orchestrator.rundir.journal import Event
from orchestrator.rundir.training_state import TRAINING, training_state
from planners.units.kinds import PHASES, kinds_of, layer_of

LOG_SECONDS = 5.0  # between two lines of a phase where there is no terminal
CURVE = 8  # letters of a curve of losses


class ProgressScreen:
    """Shows the events of a run; a context manager, because a live display must be stopped."""

    def __init__(self, console: Console, *, num_workers: int) -> None:
        self._console = console
        self._num_workers = num_workers
        self._phase, self._name = "", ""
        self._total, self._done, self._tokens = 0, 0, 0
        self._layers: set[int] = set()
        self._trainings: list[Event] = []
        self._before = 0  # steps that were done when the clock was set
        self._begun, self._last_line = time.monotonic(), 0.0
        self._task: TaskID | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ProgressScreen":
        """Start the live display."""
        self._progress.start()
        self._task = self._progress.add_task("start", total=None, rate="starting Ray")
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the live display."""
        if not self._phase and self._task is not None:
            self._progress.remove_task(self._task)  # nothing began: all was done before
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "phase begins":
            self._begin(event)
        elif kind == "phase ends":
            self._end(event)
        elif kind in kinds_of(self._phase):
            self._advance(event)
        elif kind == TRAINING and self._phase:
            self._train(event)
        elif kind == "statistics missing":
            self._console.print(f"calibrating missing statistics: {event['detail']}")
        elif kind == "step":
            self._console.print(Text.assemble((event["unit"], "bold"), f": {event['detail']}"))
        elif kind in RECOVERY_TEXT:
            self._console.print(_trouble(event))

    def _begin(self, event: Event) -> None:
        if event["unit"] == "run" or not event["tokens"]:
            return
        if not self._phase and self._task is not None:
            self._progress.remove_task(self._task)  # that of the start
        self._phase = self._name = event["unit"]
        self._total = event["tokens"]
        self._done, self._tokens, self._layers, self._begun = 0, 0, set(), time.monotonic()
        self._trainings, self._before = [], 0
        words = PHASES[self._phase].first_words if self._phase in PHASES else ""
        self._task = self._progress.add_task(self._phase, total=self._total, rate=words)

    def _advance(self, event: Event) -> None:
        self._done += 1
        self._tokens += event["tokens"]
        seconds = max(time.monotonic() - self._begun, 1e-6)
        layer = layer_of(event["unit"])
        self._layers |= set() if layer is None else {layer}
        if self._phase == "evaluate":
            self._name = f"evaluate {event['unit'].split('-')[1]}"  # evaluation-dense-part-00000
        rate = self._rate(seconds)
        if self._task is not None:
            self._progress.update(
                self._task, completed=self._done, description=self._name, rate=rate
            )
        if self._done < self._total:
            left = seconds / (self._done - self._before) * (self._total - self._done)
            done = f"{self._done} of {self._total} steps"
            self._log(f"{done}, {rate}, about {left:.0f} s left")

    def _train(self, event: Event) -> None:
        """Show how far the training of the whole model is; the bar counts its steps meanwhile."""
        self._trainings.append(event)
        state = training_state(self._trainings)
        if state is None:
            return
        done, total = state.step, state.steps
        said = f"{state.text} {sparkline(state.losses, width=CURVE)}"
        if state.is_done:
            self._done += 1
            self._before, self._begun = self._done, time.monotonic()
            done, total = self._done, self._total
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, rate=said)
        left = "" if state.seconds_left is None else f", about {state.seconds_left:.0f} s left"
        self._log(f"step {state.step} of {state.steps}, {said}{left}")

    def _log(self, said: str) -> None:
        """Print a line about the running phase where there is no terminal, but not too often."""
        if not self._console.is_terminal and time.monotonic() - self._last_line > LOG_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"{self._name}: {said}")

    def _rate(self, seconds: float) -> str:
        """Return the rate, the number of layers and the number of workers."""
        said = []
        if self._tokens:
            said.append(f"{self._tokens / seconds:,.0f} tok/s")
        if self._layers:
            said.append(f"{len(self._layers)} layer" + ("s" if len(self._layers) > 1 else ""))
        if self._phase not in PHASES or PHASES[self._phase].by_workers:
            said.append(f"{self._num_workers} worker" + ("s" if self._num_workers > 1 else ""))
        return " · ".join(said)

    def _end(self, event: Event) -> None:
        if event["unit"] == self._phase and not self._console.is_terminal:
            how = "done in" if self._done >= self._total else "stopped after"
            self._console.print(f"{self._name}: {how} {event['seconds']:.1f} s")
        if event["unit"] == self._phase:
            self._phase, self._task = "", None


def _trouble(event: Event) -> Text:
    """Return one line about a failure or a wait, and how it is handled."""
    kind = event["kind"]
    detail = event["detail"].removeprefix(f"{kind}: ").partition("\n")[0].rstrip(".")
    who = " ".join(part for part in (event["worker"], event["unit"]) if part)
    words = f" {who}: {detail}. " if who and detail else f" {who or detail}. "
    return Text.assemble((kind, "yellow"), words, RECOVERY_TEXT[kind])
