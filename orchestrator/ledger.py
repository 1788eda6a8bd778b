"""Which units are done: the records of a run, checked against its files."""

from actors.messages import UnitDone
from actors.storage.files import Directory
from actors.storage.records import Record, is_intact, read_records, write_record
from planners.units import Unit


class Ledger:
    """The records of one run as the driver sees them.

    Only the driver writes records, after it has accepted a worker's answer: a worker that was given
    up cannot publish, whatever it still writes.
    """

    def __init__(self, run: Directory, *, verify_hashes: bool = False) -> None:
        """Read the records of earlier drivers; those whose files changed do not count."""
        self._run = run
        found = read_records(run)
        self._records = {
            name: record
            for name, record in found.items()
            if is_intact(run, record, hashes=verify_hashes)
        }
        self.num_resumed = 0

    def done(self, unit: Unit) -> bool:
        """Return whether a unit with these inputs needs no more work."""
        record = self._records.get(unit.name)
        return record is not None and record.fingerprint == unit.fingerprint

    def record(self, unit: Unit) -> Record:
        """Return the record of a unit that is done."""
        return self._records[unit.name]

    def todo(self, units: list[Unit]) -> list[Unit]:
        """Return the units that are not done, counting the others as resumed."""
        left = [unit for unit in units if not self.done(unit)]
        self.num_resumed += len(units) - len(left)
        return left

    def commit(self, unit: Unit, done: UnitDone, *, attempt: int) -> Record:
        """Write the record of a unit whose files are in place."""
        record = Record(
            unit=unit.name,
            fingerprint=unit.fingerprint,
            files=done.files,
            values=done.values,
            started=done.started,
            seconds=done.seconds,
            worker=done.worker,
            device=done.device,
            attempt=attempt,
            incarnation=done.incarnation,
        )
        write_record(self._run, record)
        self._records[unit.name] = record
        return record
