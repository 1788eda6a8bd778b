"""Checks of this machine before a run, with fixes."""

import contextlib
import importlib.util
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Literal
from uuid import uuid4

from packaging.requirements import Requirement

from actors.storage.files import Directory
from orchestrator.backend.local_start import socket_place
from orchestrator.remote.job_client import token_file
from orchestrator.report.numbers import bytes_text
from planners.errors import ClusterError, CompressionError

PACKAGE = "compress-cluster"
TIMEOUT_SECONDS = 4.0
SHARED_MEMORY_BYTES = 2 * 2**30
DISK_BYTES = 10 * 2**30
CLOCK_SECONDS = 60.0  # S3 refuses requests that are 15 minutes off; leases compare minutes
HUB = "https://huggingface.co"
Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        level: ``ok``; a ``note`` is for information; an ``error`` stops a run.
        name: what was checked.
        said: the result.
        fix: what to do; empty if nothing is wrong.
    """

    level: Level
    name: str
    said: str
    fix: str = ""


def examine(out: str, *, offline: bool) -> list[Check]:
    """Return the checks of this machine; ``out`` is where runs are written.

    Unless ``offline``, one request goes to the Hub. A small file is written to ``out`` and removed
    again.
    """
    looks: list[Callable[[], Iterator[Check]]] = [
        _versions, _devices, _shared_memory, _sockets, lambda: _disk(out), lambda: _rights(out),
        _token, _extras,
    ]  # fmt: skip
    if not offline:
        looks += [_hub]
    return [check for look in looks for check in look()]


def _versions() -> Iterator[Check]:
    here = ".".join(map(str, sys.version_info[:3]))
    yield Check(level="ok", name="Python", said=here)
    for text in metadata.requires(PACKAGE) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(
                level="error", name=requirement.name, said="is not installed",
                fix=f"pip install '{requirement.name}{requirement.specifier}'",
            )  # fmt: skip
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Check(
                level="error", name=requirement.name,
                said=f"{found}; needs {requirement.specifier}",
                fix=f"pip install '{requirement.name}{requirement.specifier}'",
            )  # fmt: skip
        elif requirement.name in ("ray", "torch", "transformers"):
            yield Check(level="ok", name=requirement.name, said=found)


def _devices() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check(level="ok", name="cores", said=f"{cores}, {bytes_text(memory)} of memory")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            said = f"{facts.name}, {bytes_text(facts.total_memory)}"
            yield Check(level="ok", name=f"GPU {index}", said=said)
    elif Path("/dev/nvidia0").exists():
        yield Check(
            level="error", name="GPU", said="present, but torch does not detect it",
            fix="install a torch built for CUDA and a recent enough driver; check with nvidia-smi",
        )  # fmt: skip
    else:
        yield Check(
            level="note",
            name="GPU",
            said="none; runs use the CPU, which is enough for small models",
        )


def _shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Check(
            level="warning", name="shared memory", said="/dev/shm does not exist",
            fix="Ray falls back to /tmp, which is slow; mount /dev/shm",
        )  # fmt: skip
        return
    free = shutil.disk_usage(path).free
    enough = free >= SHARED_MEMORY_BYTES
    yield Check(
        level="ok" if enough else "warning", name="shared memory",
        said=f"{bytes_text(free)} free in /dev/shm",
        fix="" if enough else "activations are kept there: docker run --shm-size=8g, or remount it",
    )  # fmt: skip


def _sockets() -> Iterator[Check]:
    """Yield where a local Ray keeps its sockets and logs."""
    try:
        place = socket_place()
    except ClusterError as error:
        yield Check(level="error", name="Ray's sockets", said=str(error), fix=error.hint)
        return
    yield Check(
        level="note" if place.why else "ok", name="Ray's sockets",
        said=f"in a new directory below {place.folder}" if place.why else f"in {place.folder}/ray",
        fix=f"{place.why}; no action is needed" if place.why else "",
    )  # fmt: skip


def _disk(out: str) -> Iterator[Check]:
    if "://" in out:
        return
    path = Path(out).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    enough = free >= DISK_BYTES
    yield Check(
        level="ok" if enough else "warning", name="disk",
        said=f"{bytes_text(free)} free at {path}",
        fix="" if enough else "`compress-cluster plan` shows what a run needs; or change --out",
    )  # fmt: skip


def _rights(out: str) -> Iterator[Check]:
    """Write, read, list and delete a small file: each needs its own permission."""
    name = f".doctor-{uuid4().hex[:8]}"
    step = "named"
    try:
        folder = Directory(out)
        if folder.is_local and not Path(folder.root).exists():
            yield Check(level="ok", name="run directory", said=f"{out} will be created")
            return
        step = "written to"
        folder.write(name, b"doctor")
        step = "read from"
        folder.read(name)
        step = "listed"
        folder.names()
        step = "deleted from"
        folder.delete(name)
    except CompressionError as error:
        yield Check(
            level="error", name="run directory", said=f"cannot be {step}: {error}",
            fix=error.hint or "credentials with rights to get, put, list and delete there",
        )  # fmt: skip
        return
    yield Check(level="ok", name="run directory", said=f"{out} can be written, read and listed")


def _token() -> Iterator[Check]:
    path = token_file()
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        yield Check(
            level="note", name="token", said=f"none at {path}; a local Ray creates its own",
            fix="for a cluster: ray get-auth-token --generate",
        )  # fmt: skip
        return
    closed = not mode & 0o077
    yield Check(
        level="ok" if closed else "error", name="token",
        said=f"{path}, " + ("private to its owner" if closed else f"open to others ({mode:o})"),
        fix="" if closed else f"chmod 600 {path}",
    )  # fmt: skip


def _hub() -> Iterator[Check]:
    """Check the login at the Hub; the date of its response checks the clock."""
    from huggingface_hub import get_token

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    path = "/api/whoami-v2" if token else "/api/models/gpt2"
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB) + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            date = answer.headers.get("Date", "")
        said = "reachable, logged in" if token else "reachable, not logged in"
        yield Check(
            level="ok" if token else "note", name="Hub", said=said,
            fix="" if token else "hf auth login, for gated models, such as Llama",
        )  # fmt: skip
    except urllib.error.HTTPError as error:
        with error:
            date = error.headers.get("Date", "")
        yield Check(
            level="error" if token else "warning", name="Hub",
            said=f"returned HTTP {error.code}" + (": the login is not valid" if token else ""),
            fix="hf auth login" if token else "try again later, or use a local directory",
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Check(
            level="warning", name="Hub", said=f"cannot be reached: {reason}",
            fix="models and texts in local paths and object stores need no Hub; HF_HUB_OFFLINE=1",
        )  # fmt: skip
        return
    yield from _clock(date)


def _clock(date: str) -> Iterator[Check]:
    with contextlib.suppress(ValueError, TypeError):
        off = time.time() - parsedate_to_datetime(date).timestamp()
        right = abs(off) <= CLOCK_SECONDS
        yield Check(
            level="ok" if right else "error", name="clock", said=f"{abs(off):.0f} s off",
            fix="" if right else "timedatectl set-ntp true; object stores reject a wrong clock",
        )  # fmt: skip


def _extras() -> Iterator[Check]:
    """Yield optional packages and whether they are installed."""
    for module, why in (
        ("boto3", "cluster.yaml on AWS"),
        ("pandas", "training of a whole model, by Ray Train,"),
        ("sentencepiece", "text for a model that has only a tokenizer.model"),
    ):
        there = importlib.util.find_spec(module) is not None
        yield Check(
            level="ok" if there else "note", name=module,
            said="installed" if there else f"is not installed; {why} needs it",
            fix="" if there else f"pip install {module}",
        )  # fmt: skip
