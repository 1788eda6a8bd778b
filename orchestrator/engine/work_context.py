"""What the phases of a run share: its directory, ledger, journal and workers."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from actors.storage.files import Directory
from orchestrator.engine.worker_pool import Pool
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkContext:
    """What the phases of a run share: its directory, ledger, journal and workers."""

    run: Directory
    ledger: Ledger
    journal: Journal
    pool: Pool

    @contextlib.contextmanager
    def phase(self, name: str, *, total: int, begun: float = 0.0) -> Iterator[None]:
        """Emit the start of a phase of ``total`` units, and its end with its duration.

        Args:
            name: of the phase.
            total: its units.
            begun: when it began, in seconds since the epoch, if it was before this call.

        Raises:
            KeyboardInterrupt: the user requested a stop.
        """
        if self.pool.interruption.requested:
            raise KeyboardInterrupt  # between two phases: nothing is running
        started = begun or time.time()
        self.journal.emit("phase begins", unit=name, tokens=total)
        try:
            yield
        finally:
            self.journal.emit("phase ends", unit=name, start=started, seconds=time.time() - started)
            self.journal.flush()
