"""Follow a run until it ends: a live screen on a terminal, log lines elsewhere."""

import time

from rich.console import Console
from rich.live import Live

from orchestrator.remote import submission
from orchestrator.remote.snapshot import Snapshot, Watcher
from orchestrator.remote.watch_screen import lines, screen
from planners.errors import StorageError

LOCAL_SECONDS, REMOTE_SECONDS = 1.0, 5.0  # between two snapshots


def watch(uri: str, console: Console, *, price: float, once: bool) -> None:
    """Show a run on a console until it is READY or no driver works on it any more.

    Raises:
        StorageError: there is no run, and none was submitted.
    """
    watcher = Watcher(uri)
    first = watcher.snapshot()
    if first.verdict == "not begun" and submission.job_of(watcher.run) is None:
        raise StorageError(f"{uri}: there is no run here", hint="pass the --out of a run")
    if console.is_terminal and not once:
        _live(console, watcher, first, price)
    elif once:
        console.print(screen(first, price=price, now=time.time(), width=console.width))
    else:
        _log(console, watcher, first)


def _live(console: Console, watcher: Watcher, snapshot: Snapshot, price: float) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            shown = screen(snapshot, price=price, now=time.time(), width=console.width)
            live.update(shown, refresh=True)
            if _ended(watcher, snapshot):
                return
            time.sleep(_pause(watcher))
            snapshot = watcher.snapshot()


def _log(console: Console, watcher: Watcher, snapshot: Snapshot) -> None:
    before = None
    while True:
        for line in lines(before, snapshot):
            console.print(line, soft_wrap=True)
        if _ended(watcher, snapshot):
            return
        before = snapshot
        time.sleep(REMOTE_SECONDS)
        snapshot = watcher.snapshot()


def _ended(watcher: Watcher, snapshot: Snapshot) -> bool:
    """Return whether nothing more will happen: a job's driver may still start, or be restarted."""
    if snapshot.verdict in ("READY", "running"):
        return snapshot.verdict == "READY"
    job = submission.job_of(watcher.run)
    return job is None or submission.state(job) not in ("PENDING", "RUNNING")


def _pause(watcher: Watcher) -> float:
    return LOCAL_SECONDS if watcher.run.is_local else REMOTE_SECONDS
