"""The command line in a process of its own, without the seconds that its imports take."""

import contextlib
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 60


@dataclass(frozen=True)
class Finished:
    """What a process left."""

    exit_code: int
    stdout: str
    stderr: str


class WarmCommandLine:
    """Forks a process for each call from one that has imported everything already."""

    def __init__(self):
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["orchestrator.cli", "orchestrator.screens"])

    def __call__(self, arguments, *, folder, environment=()):
        """Run ``compress-cluster`` in a folder, where what it prints is kept too."""
        out, err = folder / "stdout.txt", folder / "stderr.txt"
        process = self._processes.Process(
            target=_invoke, args=([str(a) for a in arguments], folder, out, err, dict(environment))
        )
        process.start()
        process.join(_SECONDS)
        process.kill()
        return Finished(process.exitcode, out.read_text(), err.read_text())


def _invoke(arguments, folder, out, err, environment):
    os.environ.update(environment)
    os.chdir(folder)
    for path, descriptor in ((out, 1), (err, 2)):
        with Path(path).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    from orchestrator.cli import main

    with contextlib.ExitStack() as stack:
        stack.callback(sys.stdout.flush)
        stack.callback(sys.stderr.flush)
        main(arguments)
