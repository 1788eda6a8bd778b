"""Many runs as one: runs of the same model and data calibrate once, within a budget."""

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from actors.storage.files import Directory
from actors.storage.records import require_directory
from orchestrator.experiments.batch_file import Batch, Entry, Spent
from orchestrator.prepare.prepared import Prepared
from orchestrator.report.quality import quality
from orchestrator.run import run
from orchestrator.rundir import lease
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.journal import Event, Listener
from planners.errors import CompressionError

STATE = "batch.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The state of one run of a batch.

    Attributes:
        name: of its folder.
        state: ``READY``, ``failed``, or ``waiting``.
        keep_fraction: true fraction of the result; 0 where there is none.
        dense_perplexity: of the input; 0 where it was not measured.
        perplexity: of the result; 0 where there is none.
        quality: judgement of the perplexity, and ``tone``, as in `orchestrator.report.quality`.
        seconds: that it took, all its drivers together.
        calibration: ``own``, the name of the run whose statistics it used, or empty.
        error: why it failed.
    """

    name: str
    state: str
    keep_fraction: float = 0.0
    dense_perplexity: float = 0.0
    perplexity: float = 0.0
    quality: str = ""
    tone: str = ""
    seconds: float = 0.0
    calibration: str = ""
    error: str = ""


class _BudgetSpentError(Exception):
    """Stops a run in the middle; finished work is kept."""


def do_batch(batch: Batch, *, listener: Listener, on_run: Any) -> list[Row]:
    """Do the remaining runs of a batch and return its table; a failed run does not stop the others.

    Args:
        batch: from `read_batch`.
        listener: gets the events of each run.
        on_run: is called with each entry before it starts.

    Raises:
        StorageError: the directory cannot be written, or another driver works on this batch.
    """
    folder = Directory(batch.out)
    require_directory(folder)
    with lease.held(folder):
        _read_state(folder, batch)
        for entry in batch.entries:
            if finished_report(entry.prepared.run) is not None:
                continue
            if batch.budget.left(batch.spent) <= 0:
                break
            on_run(entry)
            if not _do(batch, entry, listener):
                break
            _write_state(folder, batch)
        _drop_statistics(batch)
        _write_state(folder, batch)
    return table_of(batch)


def table_of(batch: Batch) -> list[Row]:
    """Return the state of each run so far."""
    return [_row(batch, entry) for entry in batch.entries]


def waiting(batch: Batch) -> list[Entry]:
    """Return the remaining runs in order."""
    return [e for e in batch.entries if finished_report(e.prepared.run) is None]


def _do(batch: Batch, entry: Entry, listener: Listener) -> bool:
    """Do one run; return whether the budget lets another one start."""
    prepared = _sharing(batch, entry)
    clock = time.monotonic()

    def charge() -> None:
        nonlocal clock
        now = time.monotonic()
        batch.spent.seconds += now - clock
        batch.spent.worker_seconds += (now - clock) * prepared.config.workers
        clock = now

    def listen(event: Event) -> None:
        listener(event)
        charge()
        if batch.budget.left(batch.spent) <= 0:
            raise _BudgetSpentError

    batch.errors.pop(entry.name, None)
    try:
        run(prepared, listener=listen, expected=batch.expected.get(entry.name))
    except CompressionError as error:
        batch.errors[entry.name] = f"{type(error).__name__}: {error}"
    except _BudgetSpentError:
        return False
    finally:
        charge()
        _write_state(Directory(batch.out), batch)
    return True


def _sharing(batch: Batch, entry: Entry) -> Prepared:
    """Return a run that reuses the statistics of another, or keeps its own for later runs."""
    if entry.prepared.former:
        batch.shared[entry.name] = "own"
        return entry.prepared
    kind = [e for e in batch.entries if e.calibration == entry.calibration]
    others = [e for e in kind if e.name != entry.name]
    wanted = frozenset(s for e in kind for s in e.prepared.statistics)
    donors = [e for e in others if e.prepared.run.names("stats")]
    waiting = [e for e in others if finished_report(e.prepared.run) is None]
    config = entry.prepared.config
    if donors:
        batch.shared[entry.name] = donors[0].name
        return replace(
            entry.prepared,
            config=config.model_copy(update={"stats": donors[0].prepared.run.uri}),
            statistics_uri=donors[0].prepared.run.uri,
        )
    batch.shared[entry.name] = "own"
    return replace(
        entry.prepared,
        config=config.model_copy(
            update={"keep_statistics": config.keep_statistics or bool(waiting)}
        ),
        extra_statistics=wanted,
    )


def _drop_statistics(batch: Batch) -> None:
    """Delete the statistics that no run of this batch needs any more."""
    for entry in batch.entries:
        kind = [e for e in batch.entries if e.calibration == entry.calibration]
        done = all(finished_report(e.prepared.run) is not None for e in kind)
        if done and not entry.prepared.config.keep_statistics:
            for name in entry.prepared.run.names("stats"):
                entry.prepared.run.delete(name)


def _row(batch: Batch, entry: Entry) -> Row:
    report = finished_report(entry.prepared.run)
    error = batch.errors.get(entry.name, "")
    shared = batch.shared.get(entry.name, "")
    if report is None:
        state = "failed" if error else "waiting"
        return Row(name=entry.name, state=state, calibration=shared, error=error)
    measured, read = report["evaluation"], quality(report)
    return Row(
        name=entry.name,
        state="READY",
        keep_fraction=report["parameters"]["keep_fraction"],
        dense_perplexity=measured["dense"]["perplexity"],
        perplexity=measured["compressed"]["perplexity"],
        quality="" if read is None else read.word,
        tone="" if read is None else read.tone,
        seconds=report["seconds"]["total"],
        calibration=shared,
    )


def _read_state(folder: Directory, batch: Batch) -> None:
    """Read what earlier drivers spent and shared; a damaged file counts as nothing spent."""
    if folder.size(STATE) is None:
        return
    try:
        found = json.loads(folder.read(STATE))
        batch.spent = Spent(**found["spent"])
        batch.shared = {row["name"]: row["calibration"] for row in found["runs"]}
    except (ValueError, KeyError, TypeError):
        return


def _write_state(folder: Directory, batch: Batch) -> None:
    document = {"spent": asdict(batch.spent), "runs": [asdict(row) for row in table_of(batch)]}
    folder.write(STATE, json.dumps(document, indent=1, sort_keys=True).encode())
