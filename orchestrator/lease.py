"""One driver for one run directory: a file that says who, with a heartbeat."""

import contextlib
import json
import os
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
HEARTBEAT_SECONDS = 4.0
EXPIRY_SECONDS = 16.0


@contextlib.contextmanager
def held(run: Directory) -> Iterator[str]:
    """Hold the lease of a run for the length of a block; give this driver's nonce.

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
    _wait_for_holder(run)
    _write(run, me)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(run, me, stop), daemon=True, name="lease")
    beating.start()
    try:
        yield str(me["nonce"])
    finally:
        stop.set()
        beating.join()
        if not _is_of_another(run, me):
            run.delete(NAME)


def holder(run: Directory) -> dict[str, Any] | None:
    """Return who holds a run, or None where nobody does; a torn lease counts as none."""
    if run.size(NAME) is None:
        return None
    try:
        lease = json.loads(run.read(NAME))
        return lease if {"host", "pid", "since", "beat", "nonce"} <= set(lease) else None
    except (ValueError, TypeError):
        return None


def is_dead(lease: dict[str, Any]) -> bool:
    """Return whether the holder is a process of this host that no longer runs."""
    here = lease["host"] == socket.gethostname()
    return here and _process_start(int(lease["pid"])) != lease.get("started")


def _wait_for_holder(run: Directory) -> None:
    first = holder(run)
    if first is None or is_dead(first):
        return
    if first["host"] != socket.gethostname():
        deadline = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 4)
            now = holder(run)
            if now is None:
                return
            if (now["nonce"], now["beat"]) != (first["nonce"], first["beat"]):
                break
        else:
            return
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first["since"]))
    raise StorageError(
        f"{run.uri} is held by process {first['pid']} on {first['host']} since {since}",
        hint="wait for it, stop it, or use another --out",
    )


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
        stat = Path(f"/proc/{pid}/stat").read_text()
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
