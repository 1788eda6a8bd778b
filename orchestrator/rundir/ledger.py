"""Which units are done: the records of a run, checked against its files."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from actors.messages import UnitDone
from actors.storage.files import Directory, FileEntry
from actors.storage.records import (
    Record,
    damaged_files,
    delete_record,
    is_intact,
    read_records,
    write_record,
)
from planners.units.kinds import kind_of
from planners.units.units import Unit


class Ledger:
    """The records of one run as the driver sees them.

    Only the driver writes records, after it has accepted a worker's answer: a worker that was given
    up cannot publish, whatever it still writes.
    """

    def __init__(
        self,
        run: Directory,
        *,
        reuse: Directory | None = None,
        verify_hashes: bool = False,
        fence: Callable[[], None] | None = None,
    ) -> None:
        """Read the records of earlier drivers; those whose files changed do not count.

        Args:
            run: the run directory.
            reuse: another run, whose statistics and dense evaluation count too where they are of
                the same model and data.
            verify_hashes: compare bytes, not only sizes.
            fence: raises where this driver may write no more records.
        """
        self._run, self._reuse = run, reuse
        self._known = read_records(run)
        self._records = _intact(run, self._known, hashes=verify_hashes)
        self._spared: set[str] = set()
        self._fence, self._verify_hashes = fence, verify_hashes
        found = {}
        if reuse is not None:
            found = _intact(reuse, read_records(reuse), hashes=verify_hashes)
        self._reused = {n: record for n, record in found.items() if _is_reusable(n)}
        self.num_resumed = 0

    def of_step(self, run: Directory, *, reuse: Directory | None = None) -> "Ledger":
        """Return the records of a step of this run, which are read and written as these are."""
        return Ledger(run, reuse=reuse, verify_hashes=self._verify_hashes, fence=self._fence)

    def done(self, unit: Unit) -> bool:
        """Return whether a unit with these inputs needs no more work."""
        if unit.name in self._spared:
            return True
        return bool(self._found(unit)) and not self.missing_taps(unit)

    def has_record(self, name: str) -> bool:
        """Return whether a unit of that name was done once, whatever its inputs were."""
        return name in self._records

    def is_known(self, unit: Unit) -> bool:
        """Return whether a unit was done once: its numbers count, though its files may be gone."""
        found = self._known.get(unit.name)
        if found is None or found.fingerprint != unit.fingerprint:
            return self.done(unit)
        return set(unit.taps) <= set(_taps(found))

    def mark_unneeded(self, units: Sequence[Unit]) -> None:
        """Count known units as done though their files are gone: nothing will read those."""
        self._spared = {unit.name for unit in units}

    def corrupt_files(self, units: Sequence[Unit]) -> list[str]:
        """Compare the bytes of units that are done with their records; return the wrong files.

        Their units count as not done from here on.
        """
        done = [unit for unit in units if unit.name in self._records]

        def damaged(unit: Unit) -> list[str]:
            return damaged_files(self._run, self._records[unit.name], hashes=True)

        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:  # a hash holds no interpreter
            found = list(threads.map(damaged, done))
        for unit, files in zip(done, found, strict=True):
            if files:
                self.forget(unit)
        return [file for files in found for file in files]

    def missing_taps(self, unit: Unit) -> set[str]:
        """Return the statistics that no file of a unit holds yet."""
        if unit.name in self._spared:
            return set()
        return set(unit.taps) - {tap for record in self._found(unit) for tap in _taps(record)}

    def record(self, unit: Unit) -> Record:
        """Return the record of a unit that is known; of several, with the values of all."""
        found = self._found(unit) or [self._known[unit.name]]
        values = {key: value for record in found for key, value in record.values.items()}
        return replace(found[-1], values=values)

    def files(self, unit: Unit) -> tuple[tuple[str, FileEntry], ...]:
        """Return the files that a unit left, each with its directory: another run's come first."""
        return tuple((d.uri, file) for d, record in self._places(unit) for file in record.files)

    def _found(self, unit: Unit) -> list[Record]:
        return [record for _, record in self._places(unit)]

    def _places(self, unit: Unit) -> list[tuple[Directory, Record]]:
        known = ((self._reuse, self._reused), (self._run, self._records))
        found = [(directory, records.get(unit.name)) for directory, records in known]
        return [
            (directory, record)
            for directory, record in found
            if directory is not None
            and record is not None
            and record.fingerprint == unit.fingerprint
        ]

    def todo(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that are not done, counting the others as resumed."""
        left = [unit for unit in units if not self.done(unit)]
        self.num_resumed += len(units) - len(left)
        return left

    def forget(self, unit: Unit) -> None:
        """Count a unit as not done: its files are not its record's, or what it left is gone."""
        for known in (self._records, self._known, self._reused):
            known.pop(unit.name, None)
        self._spared.discard(unit.name)

    def drop(self, unit: Unit) -> None:
        """Remove what a unit left: its record first, so that no record speaks of what is gone."""
        record = self._records.get(unit.name)
        self.forget(unit)
        if record is not None:
            delete_record(self._run, record)
            for file in record.files:
                self._run.delete(file.path)

    def commit(self, unit: Unit, done: UnitDone, *, attempt: int) -> Record:
        """Write the record of a unit whose files are in place."""
        files, values = done.files, dict(done.values)
        old = self._records.get(unit.name)
        if unit.taps and old is not None and old.fingerprint == unit.fingerprint:
            # More taps of the same pass: their file lies beside the first.
            names = {file.path for file in files}
            files = (*(file for file in old.files if file.path not in names), *files)
            values = {**old.values, **values, "taps": sorted({*_taps(old), *_taps_of(values)})}
        record = Record(
            unit=unit.name,
            fingerprint=unit.fingerprint,
            files=files,
            values=values,
            started=done.started,
            seconds=done.seconds,
            worker=done.worker,
            device=done.device,
            attempt=attempt,
            incarnation=done.incarnation,
        )
        if self._fence is not None:
            self._fence()
        write_record(self._run, record)
        self._records[unit.name] = self._known[unit.name] = record
        return record


def _intact(run: Directory, found: dict[str, Record], *, hashes: bool) -> dict[str, Record]:
    return {n: record for n, record in found.items() if is_intact(run, record, hashes=hashes)}


def _is_reusable(unit: str) -> bool:
    """Return whether a unit found out about the model and data alone; results are a run's own."""
    kind = kind_of(unit)
    return kind is not None and kind.reusable


def _taps(record: Record) -> list[str]:
    return _taps_of(record.values)


def _taps_of(values: Mapping[str, object]) -> list[str]:
    taps = values.get("taps", [])
    return list(taps) if isinstance(taps, list | tuple) else []
