"""What a run directory says of a run at one moment."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from actors.storage.files import Directory
from orchestrator.engine.failure_policy import TROUBLE
from orchestrator.remote.time_left import Phase, run_left
from orchestrator.report import summary
from orchestrator.rundir import lease
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.journal import Event
from orchestrator.rundir.layout import READY
from orchestrator.rundir.training_state import TRAINING, TrainingState, training_state
from planners.errors import StorageError
from planners.simulation.simulate import Quantiles
from planners.units.kinds import STATES, WAITING, kind_of, kinds_of, layer_of

LAST_EVENTS = 6
SILENT_SECONDS = 30.0  # a heartbeat of a driver elsewhere that stands still for so long is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What one worker does.

    Attributes:
        name: its slot.
        unit: what it did last, or does.
        at: when it had done that, in seconds since the epoch.
        count: units and microbatches that it did.
        busy_seconds: that those took.
        lost: how often its process was lost.
        peak_bytes: of memory that it said it had used; 0 where it said nothing yet.
    """

    name: str
    unit: str
    at: float
    count: int
    busy_seconds: float
    lost: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        uri: of the run.
        title: model, method and size.
        quality: what a finished run lost, and whether that is usual; empty before.
        tone: ``good``, ``cost`` or ``bad``, of the verdict of a finished run.
        verdict: ``READY``, ``running``, ``stopped``, or ``not begun``.
        layers: state of each.
        phase: where it is; None between phases.
        training: how far that of the whole model is; None where none has begun.
        phases: name -> seconds, of those that ended.
        workers: by name.
        troubles: kind -> how many workers went so.
        events: the last ones, oldest first.
        seconds: since the first event, without the time in which nobody worked.
        worker_hours: that were used.
        holder: who works on it, in words.
        left: seconds until the end; None where nobody works on it or nothing was expected.
        device: what each worker has; empty where the run did not say.
        worker_bytes: of memory that the plan gives a worker; 0 likewise.
        price_per_hour: of a worker, as the run was told; 0 where it was not.
    """

    uri: str
    title: str
    quality: str
    tone: str
    verdict: str
    layers: Sequence[str]
    phase: Phase | None
    training: TrainingState | None
    phases: Mapping[str, float]
    workers: Sequence[Worker]
    troubles: Mapping[str, int]
    events: Sequence[Event]
    seconds: float
    worker_hours: float
    holder: str
    left: Quantiles | None
    device: str
    worker_bytes: int
    price_per_hour: float


class Watcher:
    """Takes snapshots of one run; what never changes is read once."""

    def __init__(self, uri: str) -> None:
        """Name a run; nothing is read."""
        self.run = Directory(uri)
        self._plan: Mapping[str, Any] = {}
        self._files: dict[str, list[Event]] = {}
        self._beat: tuple[Any, float] = (None, 0.0)

    def snapshot(self, *, now: float | None = None) -> Snapshot:
        """Return the run as it is now.

        Raises:
            StorageError: the directory cannot be read.
        """
        now = time.time() if now is None else now
        self._read_plan()
        events = self._events()
        shape = self._plan.get("plan", {}).get("shape", {})
        identity = self._plan.get("identity", {})
        verdict, holder = self._verdict()
        report = (finished_report(self.run) if verdict == "READY" else None) or {}
        forecast, ended = self._plan.get("forecast", {}), _ended(events)
        expected = forecast.get("phases", {})
        phase = _phase(events, now, expected) if verdict == "running" else None
        sessions = _sessions(events, now if verdict == "running" else None)
        workers = _workers(events)
        seconds = sum(end - begin for begin, end in sessions)
        goes_on = verdict == "running" and bool(events)
        return Snapshot(
            uri=self.run.uri,
            title=str(self._plan.get("title", "")),
            quality=summary.quality_note(report),
            tone=summary.tone(report) if report else "",
            verdict=verdict,
            layers=_layers(self.run, int(shape.get("num_layers", 0))),
            phase=phase,
            training=training_state(events),
            phases=ended,
            workers=workers,
            troubles=Counter(e["kind"] for e in events if e["kind"] in TROUBLE),
            events=[e for e in events if _is_news(e)][-LAST_EVENTS:],
            seconds=seconds,
            worker_hours=seconds * max(1, len(workers)) / 3600,
            holder=holder,
            left=run_left(identity, forecast, ended, phase) if goes_on else None,
            device=forecast.get("device", ""),
            worker_bytes=forecast.get("worker_bytes")
            or self._plan.get("plan", {}).get("worker_bytes", 0),
            price_per_hour=forecast.get("price_per_hour") or 0.0,
        )

    def _read_plan(self) -> None:
        if not self._plan and self.run.size("plan.json") is not None:
            try:
                self._plan = json.loads(self.run.read("plan.json"))
            except ValueError:
                self._plan = {}  # torn; the run writes it again

    def _events(self) -> list[Event]:
        for name in self.run.names("events"):
            if name not in self._files and name.endswith(".parquet"):
                try:
                    table = parquet.read_table(pa.BufferReader(self.run.read(name)))
                except (StorageError, pa.ArrowInvalid):
                    continue  # half-written, or gone: next time
                self._files[name] = table.to_pylist()
        rows = [row for rows in self._files.values() for row in rows]
        return sorted(rows, key=lambda row: row["at"])

    def _verdict(self) -> tuple[str, str]:
        if self.run.size(READY) is not None:
            return "READY", ""
        holder = lease.holder(self.run)
        if holder is None:
            begun = self.run.size("plan.json") is not None
            return ("stopped" if begun else "not begun"), ""
        beat = (holder["nonce"], holder["beat"])
        if beat != self._beat[0]:
            self._beat = (beat, time.monotonic())
        silent = time.monotonic() - self._beat[1] > SILENT_SECONDS
        process = f"process {holder['pid']} on {holder['host']}"
        if lease.is_dead(holder) or silent:
            return "stopped", f"{process} no longer runs"
        return "running", process


def _layers(run: Directory, num_layers: int) -> list[str]:
    states = [WAITING] * num_layers
    for name in run.names("records"):
        unit = name.removeprefix("records/").removesuffix(".json")
        kind, layer = kind_of(unit), layer_of(unit)
        if kind is not None and layer is not None and layer < num_layers:
            states[layer] = max(states[layer], kind.state, key=STATES.index)
    return states


def _phase(
    events: Sequence[Event], now: float, expected: Mapping[str, Mapping[str, float]]
) -> Phase | None:
    begins = [i for i, e in enumerate(events) if e["kind"] == "phase begins" and e["unit"] != "run"]
    if not begins:
        return None
    begin = events[begins[-1]]
    after = events[begins[-1] :]
    name = begin["unit"]
    if any(e["kind"] == "phase ends" and e["unit"] == name for e in after):
        return None
    steps = [e for e in after if e["kind"] in kinds_of(name)]
    seconds = max(now - begin["at"], 1e-6)
    done, total = len(steps), begin["tokens"]
    phase = Phase(
        name=name,
        done=done,
        total=total,
        begun=begin["at"],
        planned=expected.get(name, {}).get("p50", 0.0),
        tokens_per_second=sum(e["tokens"] for e in steps) / seconds,
        seconds_left=seconds / done * max(0, total - done) if done else None,
    )
    return _of_training(phase, after, now)


def _of_training(phase: Phase, events: Sequence[Event], now: float) -> Phase:
    """Return a phase by the steps of the training in it, then by the units that follow."""
    state = training_state(events)
    if state is None:
        return phase
    ended = next(e["at"] for e in reversed(events) if e["kind"] == TRAINING)
    if not state.is_done:
        left = None if state.seconds_left is None else max(0.0, state.seconds_left - now + ended)
        return replace(
            phase,
            done=state.step,
            total=state.steps,
            tokens_per_second=state.tokens_per_second,
            seconds_left=left,
        )
    units = phase.done  # those behind the training, which is itself one of the phase
    left = (now - ended) / units * max(0, phase.total - units - 1) if units else None
    return replace(phase, done=units + 1, tokens_per_second=0.0, seconds_left=left)


def _ended(events: Sequence[Event]) -> dict[str, float]:
    ended: Counter[str] = Counter()
    for event in events:
        if event["kind"] == "phase ends" and event["unit"] != "run":
            ended[event["unit"]] += event["seconds"]
    return dict(ended)


def _workers(events: Sequence[Event]) -> list[Worker]:
    names = sorted({e["worker"] for e in events if e["worker"].startswith("worker-")}, key=_number)
    workers = []
    for name in names:
        own = [e for e in events if e["worker"] == name]
        did = [e for e in own if e["start"]]
        last = did[-1] if did else own[-1]
        workers.append(
            Worker(
                name=name,
                unit=_did(last),
                at=last["at"],
                count=len(did),
                busy_seconds=sum(e["seconds"] for e in did),
                lost=sum(e["kind"] in TROUBLE for e in own),
                peak_bytes=max(e.get("peak_bytes") or 0 for e in own),
            )
        )
    return workers


def _did(event: Event) -> str:
    """Return what an event says was done; most units say their kind themselves."""
    unit = str(event["unit"])
    return unit if kind_of(unit) is not None else f"{event['kind']} {unit}"


def _number(name: str) -> tuple[int, str]:
    number = name.rpartition("-")[2]
    return (int(number) if number.isdigit() else 0, name)


def _sessions(events: Sequence[Event], until: float | None) -> list[tuple[float, float]]:
    """Return when drivers worked: each begins with a phase ``run`` and ends with its last event."""
    begins = [i for i, e in enumerate(events) if e["kind"] == "phase begins" and e["unit"] == "run"]
    ends = [*begins[1:], len(events)][: len(begins)]
    sessions = [
        (events[b]["at"], events[e - 1]["at"]) for b, e in zip(begins, ends, strict=True)
    ]  # fmt: skip
    if sessions and until is not None:
        sessions[-1] = (sessions[-1][0], max(until, sessions[-1][1]))
    return sessions


def _is_news(event: Event) -> bool:
    return event["kind"] in (*TROUBLE, "phase begins", "phase ends", "statistics missing") and (
        event["unit"] != "run" or event["kind"] in TROUBLE
    )
