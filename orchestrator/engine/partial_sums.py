"""Partial sums of a pass: what a replacement worker, or the next driver, resumes from.

They are saved only where that pays: a pass is often over before it does. A record says which file
of a layer counts; the file names contain the worker's incarnation, so that a replaced worker cannot
overwrite what its successor resumes from.
"""

from collections.abc import Iterable, Mapping
from math import ceil

from actors.messages import PartialSums, SaveDone, UnitDone
from actors.storage.files import Directory
from actors.worker.stage import PARTIAL
from orchestrator.rundir.ledger import Ledger
from planners.canonical_json import SCHEMA_VERSION, fingerprint
from planners.units.units import Unit

MIN_SECONDS = 60.0  # of work that may be lost: less is not worth saving
SHARE = 0.05  # of a pass's time that saving may take
BYTES_PER_SECOND = 1e8  # assumed speed of a store, until the first save is timed


def interval(*, step_seconds: float, save_seconds: float) -> int:
    """Return after how many microbatches to save, from the durations of a step and a save.

    Saving then takes at most `SHARE` of the time, and a lost worker loses at most `MIN_SECONDS` of
    work, or ``save_seconds / SHARE`` if that is more.
    """
    worth = max(MIN_SECONDS, save_seconds / SHARE)
    return max(1, ceil(worth / max(step_seconds, 1e-6)))


class Partials:
    """The partial sums of a run, as the driver sees them."""

    def __init__(self, run: Directory, ledger: Ledger, units: Mapping[int, Unit]) -> None:
        """Keep the unit of each layer's sums, with the taps that are being summed."""
        self._run, self._ledger = run, ledger
        self._units = {layer: _unit(unit) for layer, unit in units.items()}

    def found(self, layers: Iterable[int]) -> tuple[PartialSums, ...]:
        """Return the newest partial sums of each layer; a layer without matching ones has none."""
        found = []
        for layer in sorted(layers):
            unit = self._units[layer]
            if self._ledger.done(unit):
                record = self._ledger.record(unit)
                following = record.values["next"]
                assert isinstance(following, int)  # written below
                found.append(PartialSums(layer=layer, next=following, file=record.files[0]))
        return tuple(found)

    def accept(self, done: SaveDone, *, worker: str) -> None:
        """Record what a live worker has saved, and remove the files it replaces."""
        for partial in done.partials:
            old = {p.file.path for p in self.found([partial.layer])} - {partial.file.path}
            saved = UnitDone(
                unit=self._units[partial.layer].name,
                worker=worker,
                incarnation=done.incarnation,
                device="",
                files=(partial.file,),
                values={"next": partial.next},
                started=done.started,
                seconds=done.seconds,
            )
            self._ledger.commit(self._units[partial.layer], saved, attempt=1)
            for name in old:
                self._run.delete(name)

    def forget(self, layer: int) -> None:
        """Remove a layer's partial sums: its statistics have a record."""
        self._ledger.drop(self._units[layer])

    def clear(self) -> None:
        """Remove unrecorded files of lost workers; called while no pass is running."""
        for name in self._run.names(PARTIAL):
            self._run.delete(name)


def _unit(unit: Unit) -> Unit:
    key = {"schema": SCHEMA_VERSION, "kind": "partial", "of": unit.fingerprint}
    return Unit(
        name=f"partial-{unit.name.removeprefix('statistics-')}",
        kind="partial",
        index=unit.index,
        inputs=(),
        fingerprint=fingerprint({**key, "taps": sorted(unit.taps)}),
    )
