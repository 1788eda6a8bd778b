"""Processes of their own, without the seconds that their imports take."""

import contextlib
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

PRINTED = ("stdout.txt", "stderr.txt")
_SECONDS = 60


@dataclass(frozen=True)
class Finished:
    """What a process left."""

    exit_code: int
    stdout: str
    stderr: str


def in_new_process(function, *arguments, seconds=_SECONDS):
    """Call a function in a process forked from one that has imported everything; return its code.

    What transformers registers as it loads code of a model stays for the life of a process.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["orchestrator.cli.main", "orchestrator.cli.run"])
    process = processes.Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    return process.exitcode


def command_line(arguments, *, folder, environment=(), seconds=_SECONDS):
    """Run ``compress-cluster`` in a folder, where what it prints is kept too."""
    words = [str(argument) for argument in arguments]
    exit_code = in_new_process(_invoke, words, folder, dict(environment), seconds=seconds)
    stdout, stderr = ((folder / name).read_text() for name in PRINTED)
    return Finished(exit_code, stdout, stderr)


def _invoke(arguments, folder, environment):
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, name in enumerate(PRINTED, start=1):
        with Path(name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    from orchestrator.cli.main import main

    with contextlib.ExitStack() as stack:
        stack.callback(sys.stdout.flush)
        stack.callback(sys.stderr.flush)
        main(arguments)
