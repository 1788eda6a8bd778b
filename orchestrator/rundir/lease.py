"""One driver for one run directory: a file that says who, with a heartbeat."""

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
COMING = re.compile(re.escape(NAME) + r"\.[0-9a-f]{32}")  # of a driver that comes: its nonce
LOOK_SECONDS = 0.5  # a lease that was looked at is good for so long
MAX_BYTES = 10_000
MAX_TEXT = 255  # characters of a host's name
MAX_SINCE = 4e9  # seconds since the epoch; the year 2096
HEARTBEAT_SECONDS = 4.0
EXPIRY_SECONDS = 16.0
BACK_OFF = 4.0  # at most so many times as long as the try took that met another driver


class Hold:
    """A lease as its holder sees it: another driver may take it from one that it takes for dead."""

    def __init__(self, run: Directory, nonce: str) -> None:
        self._run, self._nonce = run, nonce
        self._looked = time.monotonic()

    def require(self) -> None:
        """See that it is still held, before anything is written that counts.

        Raises:
            StorageError: another driver took over.
        """
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        now = holder(self._run)
        if now is not None and now["nonce"] != self._nonce:
            raise StorageError(
                f"{self._run.uri} was taken over by process {now['pid']} on {now['host']}, which "
                "took this one for dead",
                hint="it goes on with the run; nothing more is written from here",
            )
        self._looked = time.monotonic()


@contextlib.contextmanager
def held(run: Directory) -> Iterator[Hold]:
    """Hold the lease of a run for the length of a block.

    A holder that is a dead process of this host is replaced at once. A holder elsewhere, or one
    that cannot be told, is replaced when its heartbeat has stood still for one expiry.

    Raises:
        StorageError: another live driver holds it; the message says who, and since when.
    """
    me = {
        "nonce": uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "since": time.time(),
        "beat": 0,
    }
    gone = _wait_for_holder(run)
    with _alone(run, str(me["nonce"])):
        now = holder(run)
        if now is not None and now != gone:
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
    """Return who holds a run, or None where nobody does; a torn lease counts as none."""
    size = run.size(NAME)
    if size is None or size > MAX_BYTES:
        return None
    try:
        lease = json.loads(run.read(NAME))
    except (ValueError, RecursionError):
        return None
    return lease if isinstance(lease, dict) and _is_sound(lease) else None


def _is_sound(lease: dict[str, Any]) -> bool:
    """Return whether every field is one that a driver writes: anybody may have written the file."""
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
    """Return the lease of a holder that is gone, or None where there is none."""
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
    """Keep other drivers out while this one looks who holds the run and writes its own name.

    `pyarrow.fs` offers no conditional write. So each driver first leaves a file that says that it
    comes, and looks for those of others after. Of two at least one finds the other's, in whatever
    order and however slowly they are written, and whoever finds one steps back for a while.
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
                if now - since[name] > EXPIRY_SECONDS:  # its driver died on the way
                    run.delete(name)
            time.sleep(random.uniform(0, BACK_OFF) * (time.monotonic() - begun))
        yield
    finally:
        run.delete(mine)


def _beat(run: Directory, me: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        me["beat"] += 1
        # A store that is away for a moment must not end the run; the next beat tries again.
        with contextlib.suppress(StorageError):
            if _is_of_another(run, me):
                return
            _write(run, me)


def _is_of_another(run: Directory, me: dict[str, Any]) -> bool:
    """Return whether another driver took over from one that was taken for dead."""
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
