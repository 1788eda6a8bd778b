"""Start Ray on this machine: choose a directory for its sockets, and explain a failed start."""

import contextlib
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planners.errors import ClusterError

MAX_SOCKET_BYTES = 107  # maximum length of a socket's path on Linux
# What Ray adds to its directory, with a process id of seven digits.
SOCKETS = "/session_2026-01-01_00-00-00_000000_1234567/sockets/dash_TaskEventsHead"
SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_TIME = re.compile(r"timed? ?out|deadline|failed to (start|connect to) gcs", re.IGNORECASE)
_LOGGED = re.compile(r"\[[^\]]*\]\s*")  # prefix of a line in Ray's logs


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketPlace:
    """Where the Ray of this command keeps its sockets and logs.

    Attributes:
        folder: an existing directory; Ray creates its own below it.
        why: the environment's directory cannot be used; empty if it can.
    """

    folder: str
    why: str = ""


def socket_place() -> SocketPlace:
    """Return a directory for Ray's sockets: TMPDIR's if they fit there, else one of short path.

    Raises:
        ClusterError: there is no such directory.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    requested = os.environ.get(name) or SHORT[0]
    spare = MAX_SOCKET_BYTES - len(os.fsencode(f"{requested}/ray{SOCKETS}"))
    refused = f"{-spare} bytes too long for Ray's sockets" if spare < 0 else _refusal(requested)
    if not refused:
        return SocketPlace(folder=requested)
    why = f"{name} is {requested}: {refused}"
    for folder in (*SHORT, os.environ.get("XDG_RUNTIME_DIR", "")):
        if folder and folder != requested and not _refusal(folder):
            return SocketPlace(folder=folder, why=why)
    raise ClusterError(
        f"no directory can hold Ray's sockets: {why}",
        hint="set TMPDIR to a directory with a short path that is writable and has free space",
    )


@contextlib.contextmanager
def sockets() -> Iterator[str | None]:
    """Yield the directory for the Ray of this block; None is Ray's own default.

    A directory other than the environment's is new, private to this user, and removed afterwards.

    Raises:
        ClusterError: no directory can be used.
    """
    place = socket_place()
    if not place.why:
        yield None
        return
    folder = tempfile.mkdtemp(prefix="cc-", dir=place.folder)  # mode 0700, and no symlink
    try:
        yield f"{folder}/ray"  # Ray makes its directory readable by all users
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # ending processes may still write there


def _refusal(folder: str) -> str:
    """Return why no file can be written to a directory, which is created if it is missing."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def half_started(error: BaseException) -> Any | None:
    """Return the Ray node whose start failed; the caller ends its processes."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals.get("self")
        if hasattr(found, "kill_all_processes") and hasattr(found, "dead_processes"):
            return found
    return None


def was_slow(error: BaseException, node: Any | None) -> bool:
    """Return whether a start only took too long.

    It timed out, and none of its processes ended but for having waited too long for another one.
    """
    dead = node.dead_processes() if node is not None else []
    return bool(_TIME.search(_last_words(node, dead[0][0]) if dead else str(error)))


def refusal_of_start(error: BaseException, node: Any | None) -> ClusterError:
    """Return why Ray did not start on this machine, and what to do about it."""
    dead = node.dead_processes() if node is not None else []
    if dead and not was_slow(error, node):
        kind = dead[0][0]
        return ClusterError(
            f"Ray did not start on this machine: its {kind} exited: {_last_words(node, kind)}",
            hint="compress-cluster doctor checks this machine: memory, /dev/shm, versions",
        )
    if was_slow(error, node):
        return ClusterError(
            f"Ray did not start on this machine, tried twice: {first_line(error)}",
            hint="the machine is busy: try again later, or give Ray more time with "
            "RAY_gcs_server_port_wait_time_s=300",
        )
    hint = "compress-cluster doctor checks this machine"
    if isinstance(error, OSError):
        hint = "TMPDIR and the home directory must be writable and have free space: "
        hint += "compress-cluster doctor checks them"
    elif "memory" in str(error):
        hint = "fewer --workers, fewer --microbatch-tokens, or a machine with more memory"
    return ClusterError(f"Ray did not start on this machine: {first_line(error)}", hint=hint)


def refusal_of_cluster(error: BaseException, address: str) -> ClusterError:
    """Return why a cluster cannot be joined, and what to do about it."""
    reason, cause = first_line(error), first_line(error.__cause__ or error)
    reason += "" if cause in reason else f": {cause}"
    hint = "start one with `ray start --head`, or use --address local"
    if "ersion mismatch" in reason:
        hint = "install the same Python and versions on both: pip install -c constraints.txt"
    elif re.search(r"authenticat|token", reason, re.IGNORECASE):
        hint = "copy ~/.ray/auth_token from the cluster's head node, or set RAY_AUTH_TOKEN"
    elif address == "auto" and os.environ.get("RAY_ADDRESS"):
        reason = f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']}, and {reason}"
        hint = "--address auto uses RAY_ADDRESS: unset it, or set it to HOST:PORT"
    return ClusterError(f"no Ray cluster at {address!r}: {reason}", hint=hint)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _last_words(node: Any, kind: str) -> str:
    """Return the last log line of one of Ray's processes, or that there is none."""
    for suffix in ("err", "out", "log"):
        with contextlib.suppress(OSError):
            text = Path(node.get_logs_dir_path(), f"{kind}.{suffix}").read_text(
                encoding="utf-8", errors="replace"
            )
            lines = [line for line in text.splitlines() if line.strip()]
            errors = [line for line in lines if " C " in line or " E " in line]
            if lines:  # a stack trace follows the error
                return _LOGGED.sub("", (errors or lines)[-1]).strip()
    return "it left no message"
