"""The job on the cluster's head node: run the driver, and restart it if it was killed."""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.remote.submission import PACKAGE, words_of
from planners.errors import ClusterError

RETRY_EXIT_CODES = (1, 4, 6)  # a defect, the cluster, storage: a retry may succeed
INTERRUPTED = 130
PAUSE_SECONDS = 5.0  # before the next try; doubled each time


def keep_alive(
    command: list[str], *, tries: int, say: Callable[[str], None], secret: str = ""
) -> int:
    """Run a command until it succeeds or fails for good; return the last exit code.

    A driver that was killed is restarted, and so is one that failed for the cluster or storage;
    invalid input would only fail again.

    Args:
        command: with its arguments.
        tries: attempts at most.
        say: prints why there is another attempt.
        secret: passed to each driver on its standard input.
    """
    pause = PAUSE_SECONDS
    for attempt in range(1, tries + 1):
        code = _run(command, secret)
        if code == 0 or attempt == tries or not _may_succeed(code):
            return code if code >= 0 else 128 - code
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        say(f"the driver {ended}; attempt {attempt + 1} of {tries} starts in {pause:.0f} s")
        time.sleep(pause)
        pause *= 2
    raise AssertionError("tries is 1 or more")


def do_job(
    recipe: str,
    *,
    sent_by: str,
    tries: int,
    say: Callable[[str], None],
    terms: Mapping[str, float] | None = None,
    secret: str = "",
) -> int:
    """Run on the head node what `submit` sent; return the exit code.

    Args:
        recipe: as JSON.
        sent_by: version of this package on the submitting machine.
        tries: drivers that may be started.
        say: prints why another one is started.
        terms: a worker's price and preemption rate.
        secret: the Hub token with which drivers and their workers read the model.

    Raises:
        ClusterError: this package has another version here than on the submitting machine.
    """
    here = metadata.version(PACKAGE)
    if sent_by != here:
        raise ClusterError(
            f"{PACKAGE} is {here} on the cluster and {sent_by} on the submitting machine",
            hint="`make wheel` and `ray up` again, or install the cluster's version",
        )
    with tempfile.TemporaryDirectory(prefix="compress-cluster-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "orchestrator", "run", "-r", str(path), "--yes"]
        command += words_of(terms or {})
        if secret:
            command += ["--token-on-stdin"]
        return keep_alive(command, tries=tries, say=say, secret=secret)


def _run(command: list[str], secret: str) -> int:
    """Return the exit code of a command; pass a request to stop on to it, and wait for it."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE if secret else None, text=True)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # its exit code says why
            process.stdin.write(f"{secret}\n")
    asked: list[bool] = []

    def pass_on(number: int, frame: Any) -> None:
        del number, frame
        asked.append(True)
        process.send_signal(signal.SIGINT)  # stops as Ctrl-C does: finished work is kept

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
        return INTERRUPTED if asked else code
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _may_succeed(code: int) -> bool:
    """Return whether a retry may succeed; a request to stop is not a failure."""
    requested = (-signal.SIGTERM, -signal.SIGINT)
    return code in RETRY_EXIT_CODES or (code < 0 and code not in requested)
