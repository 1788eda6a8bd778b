"""Records of completed units of work, each written after the files of its unit."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from actors.storage.files import Directory, FileEntry
from planners.errors import StorageError

SEAL = "seal"  # sha256 of the rest of a record, so that any changed byte is detected


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a unit did, which worker did it, and which files it wrote.

    Attributes:
        unit: name of the unit.
        fingerprint: of everything that determines its bytes.
        files: that it wrote.
        values: small results: losses, energies, errors.
        started: seconds since the epoch.
        seconds: how long it took.
        worker: that did it.
        device: device class.
        attempt: 1 for the first try.
        incarnation: of the worker; later messages of a replaced worker are ignored.
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
    """Write a record, which marks the unit as done."""
    run.write(_path(record.unit), sealed(asdict(record)))


def delete_record(run: Directory, record: Record) -> None:
    """Remove a record, so that the unit is no longer done."""
    run.delete(_path(record.unit))


def read_records(run: Directory) -> dict[str, Record]:
    """Return unit -> record of all intact records of a run.

    A damaged record is skipped: its unit will be recomputed.
    """
    records = {}
    for name in run.names("records"):
        if name.endswith(".json"):
            record = _parsed(run.read(name))
            if record is not None and name == _path(record.unit):
                records[record.unit] = record
    return records


def torn_records(run: Directory) -> list[str]:
    """Return the names of the record files of a run that are damaged or not records."""
    names = [name for name in run.names("records") if name.endswith(".json")]
    intact = {_path(unit) for unit in read_records(run)}
    return [name for name in names if name not in intact]


def read_record(run: Directory, unit: str) -> Record:
    """Return the record of a unit that is done.

    Raises:
        StorageError: it does not exist, or is damaged.
    """
    record = _parsed(run.read(_path(unit)))
    if record is None:
        raise StorageError(f"{run.path(_path(unit))}: is truncated or damaged")
    return record


def is_intact(run: Directory, record: Record, *, hashes: bool) -> bool:
    """Return whether all files of a record exist with their sizes and, on request, hashes."""
    return not damaged_files(run, record, hashes=hashes)


def damaged_files(run: Directory, record: Record, *, hashes: bool) -> list[str]:
    """Return the files of a record that are missing or differ in size or, on request, hash."""
    return [
        file.path
        for file in record.files
        if run.size(file.path) != file.bytes or (hashes and run.sha256(file.path) != file.sha256)
    ]


def _path(unit: str) -> str:
    return f"records/{unit}.json"


def sealed(fields: Mapping[str, object]) -> bytes:
    """Return fields as the bytes of a JSON file with a checksum of them."""
    return json.dumps({**fields, SEAL: _seal(fields)}, indent=1, sort_keys=True).encode()


def unsealed(data: bytes) -> dict[str, Any] | None:
    """Return the fields of a file that `sealed` wrote, or None where any byte was changed."""
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
    """Write and remove a small file, so that a read-only run directory fails at once.

    Raises:
        StorageError: the directory cannot be written.
    """
    try:
        run.write(".writable", b"")
        run.delete(".writable")
    except StorageError as error:
        raise StorageError(f"cannot write to the run directory: {error}") from error
