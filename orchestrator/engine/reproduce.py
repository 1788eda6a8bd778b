"""The reproducer of a failure: a file with the failed call, its inputs and all versions.

    compress-cluster reproduce RUN/failures/layer-00003.json

repeats the work in one process without a cluster, and shows the traceback. It reads the run and
writes nothing into it.
"""

import contextlib
import json
import shlex
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from actors.layer_units.reads import Reads
from actors.layer_units.registry import do_unit
from actors.messages import Assignment, CompressionJob, Microbatch, UnitTask, WorkerSetup
from actors.storage.files import Directory, HashingStream
from actors.storage.records import read_record
from actors.worker.stage import Stage
from orchestrator.rundir.versions import environment
from planners.canonical_json import to_json
from planners.errors import StorageError

FOLDER = "failures"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCall:
    """The messages that a worker gets to do a unit."""

    task: UnitTask
    job: CompressionJob


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCall:
    """The messages that a stage gets: layers to load, and a microbatch unless loading failed."""

    assignment: Assignment
    microbatch: Microbatch | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproducer:
    """What is needed to repeat a failed call.

    Attributes:
        setup: threads and device of the worker.
        call: the messages that the worker got.
        inputs: the units whose files it reads.
        fingerprint: of what determines its bytes, if it is a unit.
    """

    setup: WorkerSetup
    call: UnitCall | PassCall
    inputs: Sequence[str] = ()
    fingerprint: str = ""

    @property
    def run_uri(self) -> str:
        """The run that the call was made in."""
        call = self.call
        return call.job.run_uri if isinstance(call, UnitCall) else call.assignment.run_uri


# Serialised and parsed by the same types, so that layer numbers as keys stay numbers.
CALL: TypeAdapter[UnitCall | PassCall] = TypeAdapter(UnitCall | PassCall)
SETUP = TypeAdapter(WorkerSetup)


def write_reproducer(
    unit: str, reproducer: Reproducer, error: Exception, *, failure: str, met: Sequence[str]
) -> str:
    """Write the reproducer of a failure into its run; return the command that repeats the work.

    Args:
        unit: name of the work, and of the file.
        reproducer: the failed call.
        error: what it raised.
        failure: the class of the failure.
        met: the classes of this work's failures so far, including this one.
    """
    run, name = Directory(reproducer.run_uri), f"{FOLDER}/{unit}.json"
    command = shlex.join(["compress-cluster", "reproduce", run.path(name)])
    document = {
        "unit": unit,
        "fingerprint": reproducer.fingerprint,
        "class": failure,
        "met_before": list(met),
        "error": str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
        "traceback": "".join(traceback.format_exception(error)),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "worker": to_json(reproducer.setup),
        "inputs": [_input(run, each) for each in reproducer.inputs],
        "versions": environment(),
        "recipe": _recipe(run),
        "reproduce": command,
        "call": CALL.dump_python(reproducer.call, mode="json"),
    }
    run.write(name, json.dumps(document, indent=1, sort_keys=True).encode())
    return command


def read_reproducer(location: str) -> tuple[UnitCall | PassCall, WorkerSetup]:
    """Return what failed and the worker that did it, from a reproducer.

    Raises:
        StorageError: there is no such file, or it is not a reproducer.
    """
    folder, _, name = location.rpartition("/")
    text = Directory(folder or ".").read(name)
    try:
        document = json.loads(text)
        return CALL.validate_python(document["call"]), SETUP.validate_python(document["worker"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = str(error).partition("\n")[0]
        raise StorageError(
            f"{location}: is not a reproducer: {problem}",
            hint="a run that fails writes one to RUN/failures/UNIT.json",
        ) from error


def reproduce(call: UnitCall | PassCall, setup: WorkerSetup) -> None:
    """Repeat the work of a reproducer in this process; return if it does not fail.

    Raises:
        Exception: what the work raised.
    """
    torch.set_num_threads(setup.threads)
    with tempfile.TemporaryDirectory(prefix="compress-cluster-reproduce-") as scratch:
        if isinstance(call, UnitCall):
            run = _ReadOnly(call.job.run_uri, Directory(scratch))
            with torch.inference_mode():
                do_unit(call.task, call.job, run=run, reads=Reads(setup.device))
        else:
            _pass(call.assignment, call.microbatch, setup)


class _ReadOnly(Directory):
    """A run directory that is read in place and written to a scratch directory."""

    def __init__(self, uri: str, scratch: Directory) -> None:
        super().__init__(uri)
        self._scratch = scratch

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[HashingStream]:
        """Yield a stream into the scratch directory."""
        with self._scratch.writing(name) as stream:
            yield stream


def _pass(assignment: Assignment, sent: Microbatch | None, setup: WorkerSetup) -> None:
    """Load the layers that a stage held, and run a microbatch through them from its tokens on.

    The layers before are computed here too, one at a time, so that no other worker is needed.
    """
    if sent is None:
        Stage(setup).load(assignment)
        return
    packed = None
    for layer in range(assignment.last):
        held = layer >= assignment.first
        last = layer == assignment.last - 1
        one = replace(
            assignment,
            first=layer,
            last=layer + 1,
            embedding=layer == 0,
            head=assignment.head and last,
            statistics=assignment.statistics if held else frozenset(),
        )
        stage = Stage(setup)
        stage.load(one)
        read = not last or bool(sent.hand_over or sent.write_boundary)
        microbatch = replace(sent, index=0, hand_over=read, read_boundary="", write_boundary="")
        _, packed = stage.step(microbatch, packed)


def _input(run: Directory, unit: str) -> dict[str, Any]:
    try:
        record = read_record(run, unit)
    except StorageError:
        return {"unit": unit}  # of another run, whose statistics are reused
    return {
        "unit": unit,
        "fingerprint": record.fingerprint,
        "files": [to_json(file) for file in record.files],
    }


def _recipe(run: Directory) -> Any:
    return yaml.safe_load(run.read("run.yaml")) if run.size("run.yaml") else {}
