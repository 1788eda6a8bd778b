"""Starting a Ray on this machine: where its sockets go, and what a failed start means."""

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

MAX_SOCKET_BYTES = 107  # of the path of a socket, on Linux
# What Ray adds to its directory; seven figures of a process's number.
SOCKETS = "/session_2026-01-01_00-00-00_000000_1234567/sockets/dash_TaskEventsHead"
SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_TIME = re.compile(r"timed? ?out|deadline|failed to (start|connect to) gcs", re.IGNORECASE)
_LOGGED = re.compile(r"\[[^\]]*\]\s*")  # what Ray puts before a line of its logs


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketPlace:
    """Where a Ray of this command keeps its sockets and logs.

    Attributes:
        folder: an existing directory; Ray makes its own below it.
        why: it is not the one that the environment names; empty where it is.
    """

    folder: str
    why: str = ""


def socket_place() -> SocketPlace:
    """Return where Ray's sockets fit and can be made: where TMPDIR says, or else somewhere short.

    Raises:
        ClusterError: there is no such directory.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    asked = os.environ.get(name) or SHORT[0]
    spare = MAX_SOCKET_BYTES - len(os.fsencode(f"{asked}/ray{SOCKETS}"))
    refused = f"{-spare} bytes too long for Ray's sockets" if spare < 0 else _refusal(asked)
    if not refused:
        return SocketPlace(folder=asked)
    why = f"{name} is {asked}: {refused}"
    for folder in (*SHORT, os.environ.get("XDG_RUNTIME_DIR", "")):
        if folder and folder != asked and not _refusal(folder):
            return SocketPlace(folder=folder, why=why)
    raise ClusterError(
        f"no directory takes Ray's sockets: {why}",
        hint="set TMPDIR to a short directory that can be written and has space",
    )


@contextlib.contextmanager
def sockets() -> Iterator[str | None]:
    """Give the directory for a Ray of this block; None is the one that Ray takes by itself.

    Another than the environment names is new, of this user alone, and removed afterwards.

    Raises:
        ClusterError: there is none.
    """
    place = socket_place()
    if not place.why:
        yield None
        return
    folder = tempfile.mkdtemp(prefix="cc-", dir=place.folder)  # mode 0700, and no link of others
    try:
        yield f"{folder}/ray"  # Ray opens to all users what it makes
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # processes that end may still write there


def _refusal(folder: str) -> str:
    """Return why no file can be made in a directory, which is made where it is missing."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def half_started(error: BaseException) -> Any | None:
    """Return Ray's node whose start an error ended; its processes are left to whoever catches."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals.get("self")
        if hasattr(found, "kill_all_processes") and hasattr(found, "dead_processes"):
            return found
    return None


def was_slow(error: BaseException, node: Any | None) -> bool:
    """Return whether a start took too long only: time ran out, and no process of it has ended."""
    return bool(_TIME.search(str(error))) and not (node is not None and node.dead_processes())


def refusal_of_start(error: BaseException, node: Any | None) -> ClusterError:
    """Return why Ray did not start on this machine, and what to do about it."""
    dead = node.dead_processes() if node is not None else []
    if dead:
        kind = dead[0][0]
        return ClusterError(
            f"Ray did not start on this machine: its {kind} ended: {_last_words(node, kind)}",
            hint="compress-cluster doctor looks at this machine: memory, /dev/shm, versions",
        )
    if was_slow(error, node):
        return ClusterError(
            f"Ray did not start on this machine, tried twice: {first_line(error)}",
            hint="the machine is busy: try again later, or give Ray longer with "
            "RAY_gcs_server_port_wait_time_s=300",
        )
    hint = "compress-cluster doctor looks at this machine"
    if isinstance(error, OSError):
        hint = "TMPDIR and the home directory must take files, and have space: compress-cluster "
        hint += "doctor looks at them"
    elif "memory" in str(error):
        hint = "fewer --workers, fewer --microbatch-tokens, or a machine with more memory"
    return ClusterError(f"Ray did not start on this machine: {first_line(error)}", hint=hint)


def refusal_of_cluster(error: BaseException, address: str) -> ClusterError:
    """Return why a cluster cannot be joined, and what to do about it."""
    said, cause = first_line(error), first_line(error.__cause__ or error)
    said += "" if cause in said else f": {cause}"
    hint = "start one with `ray start --head`, or use --address local"
    if "ersion mismatch" in said:
        hint = "install the same Python and versions on both: pip install -c constraints.txt"
    elif re.search(r"authenticat|token", said, re.IGNORECASE):
        hint = "copy ~/.ray/auth_token from the head of the cluster, or set RAY_AUTH_TOKEN"
    elif address == "auto" and os.environ.get("RAY_ADDRESS"):
        said = f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']}, and {said}"
        hint = "RAY_ADDRESS is where --address auto looks: unset it, or set it to HOST:PORT"
    return ClusterError(f"no Ray cluster at {address!r}: {said}", hint=hint)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or what it is."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _last_words(node: Any, kind: str) -> str:
    """Return the last line that a process of Ray wrote, or that it wrote none."""
    for suffix in ("err", "out", "log"):
        with contextlib.suppress(OSError):
            text = Path(node.get_logs_dir_path(), f"{kind}.{suffix}").read_text(
                encoding="utf-8", errors="replace"
            )
            lines = [line for line in text.splitlines() if line.strip()]
            errors = [line for line in lines if " C " in line or " E " in line]
            if lines:  # a stack follows what was wrong
                return _LOGGED.sub("", (errors or lines)[-1]).strip()
    return "it left no message"
