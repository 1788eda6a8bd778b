"""Seconds of a small run, from typing to READY, of two trees in turn.

    .venv/bin/python benchmarks/small_run.py --before ../other-tree

A tree is a checkout with its own `.venv`. Each turn is one command in a new run directory, and its
seconds end where it prints READY. Processor seconds are those of the command and of all processes
that it started, Ray's and the workers' too, to their end, sampled five times a second: a worker
that Ray kills is nobody's child any more whose time would be told. On a machine that others use,
only these and the ratios within a round mean anything.
"""

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import psutil
from result_file import ROOT, Goal, Result, load_average, report, table
from turns import QUIET, Timings, take_turns

SAMPLE_SECONDS = 0.2
SUBREAPER = 36  # prctl: orphans of the commands become children of this process
RUNS: Mapping[str, tuple[str, ...]] = {
    "slicegpt": ("run", "tiny", "--method", "slicegpt", "--slice", "0.25"),
    "default": ("run", "tiny"),
}
ANSWERS: Mapping[str, tuple[str, ...]] = {"methods": ("methods",), "misspelt": ("run", "tini")}
MOST_SECONDS, MOST_RATIO, ANSWER_SECONDS = 16.0, 0.6, 1.0


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="tree to compare with")
    parser.add_argument("--after", type=Path, default=ROOT, help="this tree, unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for quiet")
    parser.add_argument("--quick", action="store_true", help="one round, not kept")
    given = parser.parse_args()
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    load, rounds = load_average(), 1 if given.quick else given.rounds
    trees = {"before": given.before.resolve(), "after": given.after.resolve()}
    found = {}
    cpu: dict[tuple[str, str], list[float]] = {}
    for name, words in {**RUNS, **ANSWERS}.items():
        turns: dict[str, Callable[[], float]] = {
            tree: partial(_seconds, place, words, cpu.setdefault((name, tree), []))
            for tree, place in trees.items()
        }
        found[name] = take_turns(
            turns, rounds=rounds, max_rounds=rounds, patience_seconds=given.patience / len(RUNS)
        )
    processor = {key: statistics.median(seconds) for key, seconds in cpu.items()}
    report(_result(found, processor, load, trees), keep=not given.quick)


class _Processor(threading.Thread):
    """The processor seconds of all processes that this one has started, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seconds: dict[tuple[int, float], float] = {}
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until stopped; the last value of a process that has ended stays."""
        while not self._stopped.wait(SAMPLE_SECONDS):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._seconds[process.pid, process.create_time()] = times.user + times.system

    def stop(self) -> float:
        """Return the seconds."""
        self._stopped.set()
        self.join()
        return sum(self._seconds.values())


def _seconds(tree: Path, words: tuple[str, ...], cpu: list[float]) -> float:
    """Run a command; return the seconds until it printed READY, or ended; add its processor's."""
    processor, before = _Processor(), _waited_for()
    folder = tempfile.mkdtemp(prefix="small-run-")
    out = ("--out", f"{folder}/run") if words[0] == "run" else ()
    command = [str(tree / ".venv/bin/compress-cluster"), *words, *out]
    begun, seconds = time.monotonic(), 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, text=True
    ) as running:
        assert running.stdout is not None  # it is a pipe
        for line in running.stdout:
            if line.startswith(" READY") and not seconds:
                seconds = time.monotonic() - begun
    ended = time.monotonic() - begun
    if words in RUNS.values() and (running.returncode or not seconds):
        raise SystemExit(f"{' '.join(command)}: exit code {running.returncode}")
    _reap()
    # What has ended between two samples is in the second.
    cpu.append(max(processor.stop(), _waited_for() - before))
    shutil.rmtree(folder)
    return seconds or ended


def _waited_for() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reap() -> None:
    """Wait for what the command left: only then do its processor seconds count."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _result(
    found: Mapping[str, Timings],
    processor: Mapping[tuple[str, str], float],
    load: str,
    trees: Mapping[str, Path],
) -> Result:
    rows = []
    for name, timings in found.items():
        ratio = statistics.median(timings.ratios("after", "before"))
        used = [processor[name, tree] for tree in trees]
        rows.append([
            name,
            *(f"{timings.median(tree):.1f}" for tree in trees), f"{ratio:.2f}",
            *(f"{seconds:.1f}" for seconds in used), f"{used[1] / used[0]:.2f}",
        ])  # fmt: skip
    columns = ("", "before, s", "after, s", "ratio", "before, CPU s", "after, CPU s", "CPU ratio")
    sliced, default = found["slicegpt"], found["default"]
    ratio = statistics.median(default.ratios("after", "before"))
    goals = [
        Goal(
            text=f"SliceGPT on `tiny`: at most {MOST_SECONDS:g} s to READY on an idle machine",
            measured=f"{sliced.median('after'):.1f} s",
            met=sliced.median("after") <= MOST_SECONDS,
        ),
        Goal(
            text=f"the default method on `tiny`: at most {MOST_RATIO:g} of before",
            measured=f"{ratio:.2f}",
            met=ratio <= MOST_RATIO,
        ),
    ]
    goals += [
        Goal(
            text=f"`compress-cluster {' '.join(words)}`: under {ANSWER_SECONDS:g} s of processor",
            measured=f"{processor[name, 'after']:.2f} s",
            met=processor[name, "after"] < ANSWER_SECONDS,
        )
        for name, words in ANSWERS.items()
    ]
    return Result(
        claim="small_run",
        method=" ".join((__doc__ or "").partition("\n\n")[2].split("\n\n")[1].split()),
        configuration={name: " ".join(words) for name, words in {**RUNS, **ANSWERS}.items()},
        tables={"Medians; the ratio is the median over the rounds:": table(columns, rows)},
        goals=goals,
        notes=[
            *(f"{name}: {timings.say()}" for name, timings in found.items()),
            f"A round is quiet where others have under {QUIET:.0%} of the machine; seconds on the "
            "clock of other rounds are those of a busy machine.",
        ],
        load=load,
    )


if __name__ == "__main__":
    main()
