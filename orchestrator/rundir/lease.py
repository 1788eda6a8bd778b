"""One driver per run directory: a lease file that names the driver, with a heartbeat."""

import contextlib
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from actors.storage.files import Directory
from planners.errors import StorageError

NAME = "lease.json"
COMING = re.compile(
    re.escape(NAME) + r"\.[0-9a-f]{32}"
)  # the file of a starting driver, with its nonce
LOOK_SECONDS = 0.5  # a lease that was checked is valid for this long
MAX_BYTES = 10_000
MAX_TEXT = 255  # characters of a host's name
MAX_SINCE = 4e9  # seconds since the epoch; the year 2096
HEARTBEAT_SECONDS = 4.0
EXPIRY_SECONDS = 16.0
BACK_OFF = 4.0  # maximum wait, times the duration of the attempt that met another driver


class Hold:
    """A lease as its holder sees it; another driver may take it over when the heartbeat stops."""

    def __init__(self, run: Directory, nonce: str) -> None:
        self._run, self._nonce = run, nonce
        self._checked = time.monotonic()

    def require(self) -> None:
        """Check that the lease is still held, before a record is written.

        Raises:
            StorageError: another driver took over.
        """
        if time.monotonic() - self._checked < LOOK_SECONDS:
            return
        now = holder(self._run)
        if now is not None and now["nonce"] != self._nonce:
            raise StorageError(
                f"{self._run.uri} was taken over by process {now['pid']} on {now['host']}: this "
                "process's heartbeat had stopped",
                hint="that process continues the run; this one writes nothing more",
            )
        self._checked = time.monotonic()


@contextlib.contextmanager
def held(run: Directory) -> Iterator[Hold]:
    """Hold the lease of a run for the duration of a block.

    A holder that is a dead process of this host is replaced at once. A holder on another host is
    replaced when its heartbeat has not changed for `EXPIRY_SECONDS`.

    Raises:
        StorageError: another live driver holds it; the message names its process, host and start.
    """
    me = {
        "nonce": uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "since": time.time(),
        "beat": 0,
    }
    expired = _wait_for_holder(run)
    with _alone(run, str(me["nonce"])):
        now = holder(run)
        if now is not None and now != expired:
            raise _held(run, now)
        _write(run, me)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(run, me, stop), daemon=True, name="lease")
    beating.start()
    try:
        yield Hold(run, str(me["nonce"]))
    finally:
        stop.set()
        beating.join()
        if not _is_of_another(run, me):
            run.delete(NAME)


def holder(run: Directory) -> dict[str, Any] | None:
    """Return the lease of a run, or None if it has no holder; an incomplete one counts as none."""
    size = run.size(NAME)
    if size is None or size > MAX_BYTES:
        return None
    try:
        lease = json.loads(run.read(NAME))
    except (ValueError, RecursionError):
        return None
    return lease if isinstance(lease, dict) and _is_sound(lease) else None


def _is_sound(lease: dict[str, Any]) -> bool:
    """Return whether every field has a valid value: anybody may have written the file."""
    texts = all(
        isinstance(lease.get(k), str) and lease[k].isprintable() and len(lease[k]) <= MAX_TEXT
        for k in ("nonce", "host", "started")
    )
    counts = all(type(lease.get(k)) is int and 0 <= lease[k] < 2**31 for k in ("pid", "beat"))
    timed = type(lease.get("since")) in (int, float) and 0 <= lease["since"] < MAX_SINCE
    return texts and counts and timed


def is_dead(lease: dict[str, Any]) -> bool:
    """Return whether the holder is a process of this host that no longer runs."""
    here = lease["host"] == socket.gethostname()
    return here and _process_start(lease["pid"]) != lease.get("started")


def _wait_for_holder(run: Directory) -> dict[str, Any] | None:
    """Return the lease of a holder that no longer runs, or None if there is none.

    Raises:
        StorageError: the holder is alive.
    """
    first = holder(run)
    if first is None or is_dead(first):
        return first
    if first["host"] != socket.gethostname():
        deadline = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 4)
            now = holder(run)
            if now is None:
                return None
            if (now["nonce"], now["beat"]) != (first["nonce"], first["beat"]):
                raise _held(run, now)
        return first
    raise _held(run, first)


def _held(run: Directory, lease: dict[str, Any]) -> StorageError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease["since"]))
    return StorageError(
        f"{run.uri} is held by process {lease['pid']} on {lease['host']} since {since}",
        hint="wait for it, stop it, or use another --out",
    )


@contextlib.contextmanager
def _alone(run: Directory, nonce: str) -> Iterator[None]:
    """Keep other drivers out while this one checks the lease and writes its own.

    `pyarrow.fs` offers no conditional write. So each driver first writes a file of its own, and
    then looks for those of others. Of two drivers at least one finds the other's file, in whatever
    order and however slowly they are written; a driver that finds one backs off for a while.
    """
    mine = f"{NAME}.{nonce}"
    since: dict[str, float] = {}  # other drivers' files, and when they were first seen
    try:
        while True:
            begun = time.monotonic()
            run.write(mine, b"")
            now = time.monotonic()
            found = [n for n in run.entries() if COMING.fullmatch(n) and n != mine]
            since = {name: since.get(name, now) for name in found}
            if not since:
                break
            run.delete(mine)
            for name in since:
                if now - since[name] > EXPIRY_SECONDS:  # its driver died
                    run.delete(name)
            time.sleep(random.uniform(0, BACK_OFF) * (time.monotonic() - begun))
        yield
    finally:
        run.delete(mine)


def _beat(run: Directory, me: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        me["beat"] += 1
        # A store that fails for a moment must not end the run; the next beat tries again.
        with contextlib.suppress(StorageError):
            if _is_of_another(run, me):
                return
            _write(run, me)


def _is_of_another(run: Directory, me: dict[str, Any]) -> bool:
    """Return whether another driver has taken over the lease."""
    now = holder(run)
    return now is not None and now["nonce"] != me["nonce"]


def _write(run: Directory, lease: dict[str, Any]) -> None:
    run.write(NAME, json.dumps(lease).encode())


def _process_start(pid: int) -> str:
    """Return when a process started, in the kernel's clock ticks; empty where it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return _alive_without_proc(pid)
    fields = stat.rpartition(")")[2].split()
    state, start = fields[0], fields[19]
    return "" if state in "ZX" else start  # a zombie holds nothing


def _alive_without_proc(pid: int) -> str:
    if Path("/proc").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "alive"
    return "alive"
