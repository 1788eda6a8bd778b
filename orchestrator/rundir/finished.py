"""Recognise a READY run by its files; nothing here is slow to import."""

import hashlib
import json
from typing import Any

from actors.storage.files import Directory
from actors.storage.records import read_records, torn_records, unsealed
from orchestrator.rundir.layout import READY, REPORT, RESULT


def finished_report(run: Directory, *, hashes: bool = False) -> dict[str, Any] | None:
    """Return the report of a run that is READY, or None if work is left.

    If the result's files no longer match their records, the run is not READY: the mark is removed.

    Args:
        run: the run directory.
        hashes: compare every byte of the result, not only sizes.
    """
    if run.size(READY) is None or run.size(REPORT) is None:
        return None
    data = run.read(REPORT)
    try:
        report = json.loads(data)
    except ValueError:
        return None  # incomplete; both are rewritten from the records
    mark = unsealed(run.read(READY))
    if mark is None or mark.get("report") != sha256(data) or not isinstance(report, dict):
        return None
    if not _result_is_whole(run, mark.get("units"), hashes=hashes):
        run.delete(READY)
        return None
    for name in torn_records(run):
        run.delete(name)  # of units whose files were removed; the report has their numbers
    return report


def _result_is_whole(run: Directory, units: object, *, hashes: bool) -> bool:
    """Return whether all units of a result have records, and their files match them."""
    records = read_records(run)
    if not isinstance(units, list) or not all(unit in records for unit in units):
        return False
    files = [file for unit in units for file in records[unit].files]
    return all(
        run.size(f.path) == f.bytes and (not hashes or run.sha256(f.path) == f.sha256)
        for f in files
        if f.path.startswith(RESULT)
    )


def sha256(data: bytes) -> str:
    """Return the hash of a report, as READY contains it."""
    return hashlib.sha256(data).hexdigest()
