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

    def start(self, *, avoid: Collection[str] = ()) -> Unit | None:
        """Return the next unit whose inputs are done, and count it as running.

        Args:
            avoid: units that another worker must do.
        """
        for unit in self._left:
            if unit.name not in avoid and not any(name in self._open for name in unit.inputs):
                self._left.remove(unit)
                self._running[unit.name] = unit
                self.attempts[unit.name] = self.attempts.get(unit.name, 0) + 1
                return unit
        return None

    def finish(self, unit: Unit) -> None:
        """Count a unit as done, so that units waiting for it may start."""
        del self._running[unit.name]
        self._open.discard(unit.name)

    def give_back(self, unit: Unit) -> None:
        """Put a unit back, before all others: its worker was lost."""
        del self._running[unit.name]
        self._left.insert(0, unit)
