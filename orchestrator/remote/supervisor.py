"""The job on the cluster's head: run the driver, and restart it where it was killed."""

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

RETRY_EXIT_CODES = (1, 4, 6)  # a defect, the cluster, storage: another try may do better
INTERRUPTED = 130
PAUSE_SECONDS = 5.0  # before the next try; doubled each time


def keep_alive(
    command: list[str], *, tries: int, say: Callable[[str], None], secret: str = ""
) -> int:
    """Run a command until it succeeds, fails for good, or has been tried so often.

    A driver that was killed is started again, and so is one that the cluster or storage failed;
    wrong input would only be wrong again. Returns the exit code of the last one.

    Args:
        command: with its arguments.
        tries: at most.
        say: is told why there is another try.
        secret: given to each on its standard input.
    """
    pause = PAUSE_SECONDS
    for attempt in range(1, tries + 1):
        code = _run(command, secret)
        if code == 0 or attempt == tries or not _may_do_better(code):
            return code if code >= 0 else 128 - code
        died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
        say(f"the driver {died}; try {attempt + 1} of {tries} begins in {pause:.0f} s")
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
    """Do on the head what `submit` sent; return the exit code.

    Args:
        recipe: as JSON.
        sent_by: version of this package at the sender.
        tries: drivers that may be started.
        say: is told why another one is.
        terms: what workers cost and how long they last.
        secret: the token for the Hub that drivers and their workers read the model with.

    Raises:
        ClusterError: this package is of another version here than where it was sent from.
    """
    here = metadata.version(PACKAGE)
    if sent_by != here:
        raise ClusterError(
            f"{PACKAGE} is {here} on the cluster and {sent_by} where this was sent from",
            hint="make wheel and `ray up` again, or install the cluster's version",
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
    """Return the exit code of a command; a request to end goes on to it, and is waited for."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE if secret else None, text=True)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # its exit code says why
            process.stdin.write(f"{secret}\n")
    asked: list[bool] = []

    def pass_on(number: int, frame: Any) -> None:
        del number, frame
        asked.append(True)
        process.send_signal(signal.SIGINT)  # stops as Ctrl-C does: what is done is kept

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


def _may_do_better(code: int) -> bool:
    """Return whether another try is worth it; to be told to stop is no failure."""
    told = (-signal.SIGTERM, -signal.SIGINT)
    return code in RETRY_EXIT_CODES or (code < 0 and code not in told)
