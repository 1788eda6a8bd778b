"""Checkpoints of a training in the run directory: a file of tensors, then a manifest that names it.

A manifest is sealed, and written after its file is durable; older checkpoints are removed only
then. So a process that is lost at any moment leaves one to resume from, unless there was none yet.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from uuid import uuid4

from torch import Tensor

from actors.devices.transfer import whole
from actors.storage.files import Directory, FileEntry
from actors.storage.records import sealed, unsealed
from actors.storage.tensors import StoredTensors, write_tensors
from actors.training.course import Course
from planners.errors import StorageError

FOLDER = "training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """How far a training has come.

    Attributes:
        unit: that trains.
        fingerprint: of the unit.
        incarnation: of the group of workers that wrote it.
        course: its steps, rates and losses.
        file: its state, or once it is finished the trained tensors, by their names in the model;
            None where it failed.
        finished: nothing is left to do.
        failure: why it cannot go on; empty if it can.
        hint: what to do about that.
    """

    unit: str
    fingerprint: str
    incarnation: str
    course: Course
    file: FileEntry | None
    finished: bool = False
    failure: str = ""
    hint: str = ""


def manifests(run: Directory, unit: str, fingerprint: str) -> list[Manifest]:
    """Return the intact manifests of a unit, the newest first; their files are not looked at."""
    names = [name for name in run.names(FOLDER) if _step(unit, name, "json") >= 0]
    read = (_read(run, name) for name in names)
    own = [m for m in read if m and (m.unit, m.fingerprint) == (unit, fingerprint)]
    return sorted(own, key=lambda manifest: manifest.course.step, reverse=True)


def newest(run: Directory, unit: str, fingerprint: str) -> Manifest | None:
    """Return the newest manifest of a unit whose file is as it was written; None without one.

    All of the file is read; to follow a training, `manifests` is enough.
    """
    found = manifests(run, unit, fingerprint)
    return next((each for each in found if _is_whole(run, each)), None)


class Checkpoints:
    """The checkpoints of one unit, as a worker of one group reads and writes them.

    Attributes:
        writes: it does write: all workers of a group would write the same.
    """

    def __init__(self, run: Directory, unit: str, fingerprint: str, *, writes: bool = True) -> None:
        """Name them; nothing is read or written."""
        self._run, self._unit, self._fingerprint = run, unit, fingerprint
        self.writes = writes
        self._incarnation = uuid4().hex[:12]
        self._last = -1  # step of the newest one; older ones than that may go

    def newest(self) -> Manifest | None:
        """Return the newest one that is intact."""
        return newest(self._run, self._unit, self._fingerprint)

    def at(self, step: int) -> Manifest:
        """Return an intact one at a step; if there are several, their tensors are the same.

        Raises:
            StorageError: there is none.
        """
        found = manifests(self._run, self._unit, self._fingerprint)
        for each in found:
            if each.course.step == step and _is_whole(self._run, each):
                return each
        raise StorageError(f"{self._run.path(FOLDER)}: no checkpoint of {self._unit} at {step}")

    def tensors(self, manifest: Manifest) -> Mapping[str, Tensor]:
        """Return the tensors of one that has not failed, each read when it is asked for."""
        assert manifest.file is not None  # see `Manifest`
        self._last = manifest.course.step
        return StoredTensors(self._run, manifest.file.path)

    def save(
        self, course: Course, tensors: Mapping[str, Tensor], *, finished: bool = False
    ) -> None:
        """Write one, then remove those before the last.

        All workers of a group call this: tensors may be divided over them.
        """
        if not self.writes:
            for name in sorted(tensors):
                whole(tensors[name])
            return
        file = write_tensors(self._run, self._name(course.step, "safetensors"), tensors)
        self._write(course, file=file, finished=finished)
        for name in self._run.names(FOLDER):
            for ending in ("json", "safetensors"):  # no manifest is left without its file
                if 0 <= _step(self._unit, name, ending) < self._last:
                    self._run.delete(name)
        self._last = course.step

    def fail(self, course: Course, failure: str, *, hint: str) -> None:
        """Write that the training cannot go on."""
        if self.writes:
            self._write(course, file=None, failure=failure, hint=hint)

    def remove(self) -> None:
        """Remove all of the unit, once what it has trained is stored elsewhere."""
        for name in self._run.names(FOLDER):
            if any(_step(self._unit, name, ending) >= 0 for ending in ("json", "safetensors")):
                self._run.delete(name)

    def _write(
        self,
        course: Course,
        *,
        file: FileEntry | None,
        finished: bool = False,
        failure: str = "",
        hint: str = "",
    ) -> None:
        manifest = Manifest(
            unit=self._unit,
            fingerprint=self._fingerprint,
            incarnation=self._incarnation,
            course=course,
            file=file,
            finished=finished,
            failure=failure,
            hint=hint,
        )
        fields = asdict(manifest)
        self._run.write(self._name(course.step, "json"), sealed({**fields.pop("course"), **fields}))

    def _name(self, step: int, ending: str) -> str:
        return f"{FOLDER}/{self._unit}-step-{step:05d}-{self._incarnation}.{ending}"


def _step(unit: str, name: str, ending: str) -> int:
    """Return the step that the name of a checkpoint's file says; -1 where it is none of a unit."""
    pattern = rf"{FOLDER}/{re.escape(unit)}-step-(\d+)-[0-9a-f]+\.{ending}"
    found = re.fullmatch(pattern, name)
    return int(found[1]) if found else -1


def _is_whole(run: Directory, manifest: Manifest) -> bool:
    file = manifest.file
    if file is None:
        return True
    return run.size(file.path) == file.bytes and run.sha256(file.path) == file.sha256


def _read(run: Directory, name: str) -> Manifest | None:
    """Return a manifest; None if it is damaged, or was removed since its name was listed."""
    try:
        return _parsed(run.read(name))
    except StorageError:
        if run.size(name) is None:
            return None  # the group that trains has written a newer one
        raise


def _parsed(data: bytes) -> Manifest | None:
    fields = unsealed(data)
    if fields is None:
        return None
    try:
        numbers = {name: fields.pop(name) for name in Course.__dataclass_fields__}
        file = fields.pop("file")
        entry = FileEntry(**file) if file else None
        return Manifest(**fields, course=Course(**numbers), file=entry)
    except (TypeError, KeyError):
        return None
