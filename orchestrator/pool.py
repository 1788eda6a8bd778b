"""The workers of a run: slots that are filled again when a process is lost."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from actors.messages import WorkerSetup
from actors.stage import Stage
from orchestrator.executors import Executor, Resources, WorkerLost
from orchestrator.journal import Journal
from planners.errors import ClusterError

MAX_LOSSES = 20  # a run that loses more workers than this is not being unlucky


class Pool:
    """A fixed number of slots, each with a live worker and its incarnation."""

    def __init__(
        self, executor: Executor, setup: WorkerSetup, *, num_workers: int, journal: Journal
    ) -> None:
        """Start all workers; ``setup`` is the pattern that each slot's name is put into."""
        self.executor = executor
        self._pattern = setup
        self._journal = journal
        self._losses = 0
        self.peak_bytes = 0
        self._setups = [self._setup(slot) for slot in range(num_workers)]
        self._handles = [self._spawn(slot) for slot in range(num_workers)]

    @property
    def num_workers(self) -> int:
        """Slots, all of them filled."""
        return len(self._handles)

    def incarnation(self, slot: int) -> str:
        """Return who is in a slot now; an answer of another is not listened to."""
        return self._setups[slot].incarnation

    def call(self, slot: int, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Start a call on the worker of a slot."""
        return self.executor.call(
            self._handles[slot], method, *args, num_returns=num_returns, label=label
        )

    def replace(self, slot: int, lost: WorkerLost) -> None:
        """Give a slot up and fill it with a new worker.

        Raises:
            ClusterError: too many workers were lost in this run.
        """
        self._losses += 1
        name = self._setups[slot].name
        self._journal.tell(lost.reason, worker=name, detail=str(lost))
        if self._losses > MAX_LOSSES:
            raise ClusterError(
                f"{self._losses} workers were lost in this run, the last one with: {lost}",
                hint="what is done is kept; run the same command again when the cluster is well",
            )
        self.executor.kill(self._handles[slot])
        self._setups[slot] = self._setup(slot)
        self._handles[slot] = self._spawn(slot)

    def saw(self, answers: Sequence[Any]) -> None:
        """Keep the highest memory peak that workers report."""
        self.peak_bytes = max([self.peak_bytes, *(a.peak_bytes for a in answers)])

    def close(self) -> None:
        """End all workers."""
        for handle in self._handles:
            self.executor.kill(handle)
        self._handles = []

    def _setup(self, slot: int) -> WorkerSetup:
        pattern = self._pattern
        return WorkerSetup(
            name=f"worker-{slot}",
            incarnation=uuid4().hex[:12],
            threads=pattern.threads,
            device=pattern.device,
        )

    def _spawn(self, slot: int) -> Any:
        setup = self._setups[slot]
        gpus = 1.0 if setup.device == "cuda" else 0.0
        return self.executor.spawn(
            Stage,
            setup,
            resources=Resources(num_cpus=setup.threads, num_gpus=gpus),
            name=f"{setup.name}-{setup.incarnation}",
        )
