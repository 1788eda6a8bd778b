"""The proof that a unit of work is done: its record, written after its files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from actors.storage.files import Directory, FileEntry
from planners.errors import StorageError

SEAL = "seal"  # sha256 of all else in a record, so that one wrong byte in it counts as torn


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was done, by whom, and what it left.

    Attributes:
        unit: name of the unit.
        fingerprint: of what determines its bytes.
        files: what it wrote.
        values: small numbers it found: losses, energies, errors.
        started: seconds since the epoch.
        seconds: how long it took.
        worker: who did it.
        device: device class.
        attempt: 1 for the first try.
        incarnation: of the worker; a replaced worker's later words are not listened to.
    """

    unit: str
    fingerprint: str
    files: tuple[FileEntry, ...] = ()
    values: Mapping[str, object] = field(default_factory=dict)
    started: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    device: str = "cpu"
    attempt: int = 1
    incarnation: str = ""


def write_record(run: Directory, record: Record) -> None:
    """Write a record; the unit is done from here on."""
    run.write(_path(record.unit), sealed(asdict(record)))


def delete_record(run: Directory, record: Record) -> None:
    """Remove a record; the unit is not done from here on."""
    run.delete(_path(record.unit))


def read_records(run: Directory) -> dict[str, Record]:
    """Return unit -> record of all records of a run that can be read.

    A record that is torn counts as none: its unit will be done again.
    """
    records = {}
    for name in run.names("records"):
        if name.endswith(".json"):
            record = _parsed(run.read(name))
            if record is not None and name == _path(record.unit):
                records[record.unit] = record
    return records


def torn_records(run: Directory) -> list[str]:
    """Return the names of files among the records that are none, or not as they were written."""
    names = [name for name in run.names("records") if name.endswith(".json")]
    whole = {_path(unit) for unit in read_records(run)}
    return [name for name in names if name not in whole]


def read_record(run: Directory, unit: str) -> Record:
    """Return the record of a unit that is done.

    Raises:
        StorageError: there is none, or it is torn.
    """
    record = _parsed(run.read(_path(unit)))
    if record is None:
        raise StorageError(f"{run.path(_path(unit))}: is torn")
    return record


def is_intact(run: Directory, record: Record, *, hashes: bool) -> bool:
    """Return whether all files of a record are there with their sizes, and hashes where asked."""
    return not damaged_files(run, record, hashes=hashes)


def damaged_files(run: Directory, record: Record, *, hashes: bool) -> list[str]:
    """Return the files of a record that are gone, of another size, or of other bytes if asked."""
    return [
        file.path
        for file in record.files
        if run.size(file.path) != file.bytes or (hashes and run.sha256(file.path) != file.sha256)
    ]


def _path(unit: str) -> str:
    return f"records/{unit}.json"


def sealed(fields: Mapping[str, object]) -> bytes:
    """Return fields as a file that says whether it is as it was written."""
    return json.dumps({**fields, SEAL: _seal(fields)}, indent=1, sort_keys=True).encode()


def unsealed(data: bytes) -> dict[str, Any] | None:
    """Return the fields of such a file, or None where it is torn, be it by one digit."""
    try:
        fields: dict[str, Any] = json.loads(data)
        seal = fields.pop(SEAL)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return fields if seal == _seal(fields) else None


def _seal(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _parsed(data: bytes) -> Record | None:
    fields = unsealed(data)
    if fields is None:
        return None
    try:
        files = tuple(FileEntry(**file) for file in fields.pop("files"))
        return Record(**fields, files=files)
    except (TypeError, KeyError):
        return None


def require_directory(run: Directory) -> None:
    """Write and remove a small file, so that a run that cannot be written fails at the door.

    Raises:
        StorageError: the directory cannot be written.
    """
    try:
        run.write(".writable", b"")
        run.delete(".writable")
    except StorageError as error:
        raise StorageError(f"cannot write to the run directory: {error}") from error
