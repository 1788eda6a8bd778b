"""The events of a run, as rows: passed to a listener, and stored in ``events/*.parquet``."""

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pyarrow as pa
from pyarrow import parquet

from actors.storage.files import Directory

SCHEMA = pa.schema(
    [
        ("at", pa.float64()),
        ("kind", pa.string()),
        ("unit", pa.string()),
        ("worker", pa.string()),
        ("start", pa.float64()),
        ("seconds", pa.float64()),
        ("tokens", pa.int64()),
        ("detail", pa.string()),
        ("peak_bytes", pa.int64()),
        ("written_bytes", pa.int64()),
        ("loss", pa.float64()),
    ]
)
FLUSH_SECONDS = 20.0  # so that `watch` and `status` see recent events
Event = dict[str, Any]
Listener = Callable[[Event], None]


class Journal:
    """Collects the events of one driver; every flush writes one file."""

    def __init__(self, run: Directory, listener: Listener) -> None:
        self._run = run
        self._listener = listener
        self._rows: list[Event] = []
        self.events: list[Event] = []
        self._flushed = time.monotonic()

    def emit(self, kind: str, **fields: Any) -> None:
        """Record one event and pass it to the listener.

        Fields: ``unit``, ``worker``, ``start``, ``seconds``, ``tokens``, ``detail``,
        ``peak_bytes`` of the worker's memory so far, ``written_bytes`` of the unit's files,
        ``loss`` of a training, None elsewhere.
        """
        row = {"at": time.time(), "unit": "", "worker": "", "start": 0.0, "seconds": 0.0,
               "tokens": 0, "detail": "", "peak_bytes": 0, "written_bytes": 0, "loss": None,
               "kind": kind, **fields}  # fmt: skip
        self._rows.append({name: row[name] for name in SCHEMA.names})
        self.events.append(row)
        self._listener(row)
        if kind == "phase begins" or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the events since the last flush as one more file."""
        self._flushed = time.monotonic()
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        name = f"events/{time.time():.3f}-{uuid4().hex[:8]}.parquet"
        self._run.write(name, sink.getvalue().to_pybytes())
        self._rows.clear()


def read_events(run: Directory) -> list[Event]:
    """Return all events of a run in the order they happened; columns that a file lacks are None."""
    rows: list[Event] = []
    for name in run.names("events"):
        try:
            rows += parquet.read_table(pa.BufferReader(run.read(name)), schema=SCHEMA).to_pylist()
        except (pa.ArrowException, OSError):
            continue  # incomplete: no result depends on events
    return sorted(rows, key=lambda row: row["at"])


def quiet(event: dict[str, Any]) -> None:
    """Ignore an event: a listener that shows nothing."""
    del event
