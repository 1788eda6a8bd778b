"""Where work is done and recorded, and who does it."""

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
    """Where work is done and recorded, and who does it."""

    run: Directory
    ledger: Ledger
    journal: Journal
    pool: Pool

    @contextlib.contextmanager
    def phase(self, name: str, *, total: int) -> Iterator[None]:
        """Tell listeners that a phase of so many units begins, and how long it took.

        Raises:
            KeyboardInterrupt: the user asked to stop.
        """
        if self.pool.interruption.requested:
            raise KeyboardInterrupt  # between two phases: nothing is under way
        started = time.time()
        self.journal.emit("phase begins", unit=name, tokens=total)
        try:
            yield
        finally:
            self.journal.emit("phase ends", unit=name, start=started, seconds=time.time() - started)
            self.journal.flush()
