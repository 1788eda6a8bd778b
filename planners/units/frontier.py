"""Which units may start: the bookkeeping that a run and its simulation share."""

from collections.abc import Callable, Collection, Sequence

from planners.units.units import Unit


class Frontier:
    """Which units may start: pure bookkeeping, without a clock or a cluster."""

    def __init__(self, units: Sequence[Unit], *, is_done: Callable[[Unit], bool]) -> None:
        """Start with these units, in order of priority."""
        self._left = [unit for unit in units if not is_done(unit)]
        self._open = {unit.name for unit in self._left}
        self._running: dict[str, Unit] = {}
        self.attempts: dict[str, int] = {}

    @property
    def finished(self) -> bool:
        """Nothing is left and nothing runs."""
        return not self._left and not self._running

    def next(self, *, avoid: Collection[str] = (), assuming: Collection[str] = ()) -> Unit | None:
        """Return the first unit whose inputs are done.

        Args:
            avoid: units that another worker must do.
            assuming: units that are taken as done.
        """
        undone = self._open.difference(assuming)
        for unit in self._left:
            if unit.name not in avoid and undone.isdisjoint(unit.inputs):
                return unit
        return None

    def startable(self, name: str) -> Unit | None:
        """Return the unit of that name if it is left and its inputs are done."""
        found = [unit for unit in self._left if unit.name == name]
        return found[0] if found and self._open.isdisjoint(found[0].inputs) else None

    @property
    def running(self) -> Collection[str]:
        """The names of the units that run."""
        return self._running.keys()

    def start(self, *, avoid: Collection[str] = ()) -> Unit | None:
        """Return the next unit whose inputs are done, and count it as running."""
        unit = self.next(avoid=avoid)
        if unit is not None:
            self.begin(unit)
        return unit

    def begin(self, unit: Unit) -> None:
        """Count a unit as running."""
        self._left.remove(unit)
        self._running[unit.name] = unit
        self.attempts[unit.name] = self.attempts.get(unit.name, 0) + 1

    def finish(self, unit: Unit) -> None:
        """Count a unit as done, so that units waiting for it may start."""
        del self._running[unit.name]
        self._open.discard(unit.name)

    def give_back(self, name: str) -> None:
        """Put a running unit back, before all others: its worker was lost."""
        self._left.insert(0, self._running.pop(name))
