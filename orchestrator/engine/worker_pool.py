"""The workers of a run: slots that are refilled when a process is lost."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from actors.messages import WorkerSetup
from actors.worker.stage import Stage
from orchestrator.backend.executor import (
    ActorLocation,
    Executor,
    FailureClass,
    Resources,
    WorkerLost,
)
from orchestrator.engine.deadlines import Deadlines
from orchestrator.engine.failure_policy import RESUME_HINT, class_of
from orchestrator.engine.interrupt import Interruption
from orchestrator.engine.supervisor import Supervisor
from orchestrator.rundir.journal import Journal
from planners.errors import ClusterError, CompressionError

POLL_SECONDS = 0.5
PLACE_SECONDS = 600.0  # wait for a machine with room for a worker: twice what autoscalers need
ANNOUNCE_SECONDS = 10.0  # a longer wait for a worker is announced
DRAIN_SECONDS = 1.0  # between two checks for draining nodes


@dataclass(slots=True)
class _Slot:
    """The worker of a slot; ``where`` is None until ``locating`` has answered: its process runs."""

    setup: WorkerSetup
    handle: Any
    locating: Any
    since: float
    where: ActorLocation | None = None
    announced: bool = False


class Pool:
    """A fixed number of slots, each with a worker that runs or is starting.

    Attributes:
        deadlines: how long calls of this run take.
        supervisor: counts failures and decides what follows.
        interruption: whether the user has requested a stop.
        peak_bytes: the highest memory peak that a worker reported.
    """

    def __init__(
        self,
        executor: Executor,
        setup: WorkerSetup,
        *,
        num_workers: int,
        journal: Journal,
        place_seconds: float = PLACE_SECONDS,
    ) -> None:
        """Start all workers, each with the threads and device of ``setup`` and its own name."""
        self.executor = executor
        self.deadlines, self.supervisor = Deadlines(), Supervisor(journal.emit)
        self.interruption, self._stopping = Interruption(), False
        self.peak_bytes = 0
        self._pattern, self._journal = setup, journal
        self._place_seconds = place_seconds
        self._draining: dict[int, float] = {}  # slot -> when its node will be gone
        self._checked_at, self._has_requested = 0.0, False
        self._resources = Resources.of_worker(setup.threads, setup.device)
        self._slots = [self._filled(slot) for slot in range(num_workers)]

    @property
    def num_workers(self) -> int:
        """The number of slots, whether their workers run yet or not."""
        return len(self._slots)

    @property
    def open_slots(self) -> list[int]:
        """The slots whose worker runs on a node that is not draining."""
        return [
            n for n, s in enumerate(self._slots) if s.where is not None and n not in self._draining
        ]

    def incarnation(self, slot: int) -> str:
        """Return the id of a slot's current worker; answers of earlier workers are ignored."""
        return self._slots[slot].setup.incarnation

    def call(self, slot: int, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Start a call on the worker of a slot; it is queued until the worker runs."""
        return self.executor.call(
            self._slots[slot].handle, method, *args, num_returns=num_returns, label=label
        )

    def ready(self, tickets: Sequence[Any], *, needed: Iterable[int] = ()) -> list[Any]:
        """Return the tickets that have answered, waiting up to `POLL_SECONDS` for the first.

        This also notes workers that have started, and nodes that drain.

        Args:
            tickets: of calls.
            needed: slots that all must have a worker; if none are given, any one slot is enough.

        Raises:
            ClusterError: no machine had room for a worker for too long.
        """
        locating = {slot.locating: slot for slot in self._slots if slot.where is None}
        answered = self.executor.ready([*locating, *tickets], seconds=POLL_SECONDS)
        for ticket in answered:
            if ticket in locating:
                self._arrive(locating[ticket])
        self._wait_for_places(list(needed))
        if self.interruption.requested and not self._stopping:
            self._stopping = True
            self._journal.emit("stopping", detail="saving unfinished work first")
        self._check_draining()
        return [ticket for ticket in answered if ticket not in locating]

    def seconds_left(self, slot: int) -> float | None:
        """Return the seconds until the node of a slot is preempted, or None if it is not."""
        deadline = self._draining.get(slot)
        return None if deadline is None else deadline - time.monotonic()

    def replace(self, slot: int, error: Exception) -> None:
        """Replace the worker of a slot for a failure that has been counted."""
        self.renew(slot, listens=class_of(error) is not FailureClass.STALLED)

    def leave_node(self, slot: int) -> None:
        """Replace a worker before its node is preempted, and count the preemption.

        Raises:
            ClusterError: too many nodes were preempted in this run.
        """
        lost = WorkerLost(FailureClass.PREEMPTED, "its node is about to be preempted")
        self.supervisor.count(lost, worker=self.setup(slot).name)
        self.replace(slot, lost)

    def renew(self, slot: int, *, listens: bool) -> None:
        """Give a slot a new worker; kill the process of an old one that does not listen.

        It would otherwise keep its cores, and there might be no room for its successor.
        """
        where = self._slots[slot].where
        if where is not None and not listens:
            self.executor.kill_process(where)
        self.executor.kill(self._slots[slot].handle)
        self._draining.pop(slot, None)
        self._slots[slot] = self._filled(slot)

    def is_running(self, slot: int) -> bool:
        """Return whether the process of a slot runs; until it does, no call on it can be late."""
        return self._slots[slot].where is not None

    def setup(self, slot: int) -> WorkerSetup:
        """Return the setup of a slot's worker: name, incarnation, threads and device."""
        return self._slots[slot].setup

    def report_stalled(self, slot: int, label: str, *, seconds: float) -> None:
        """Report a call that does not answer, with the stack trace of its process."""
        where = self._slots[slot].where
        stack = self.executor.stack(where) if where is not None else ""
        detail = f"no answer for {seconds:.0f} s\n{stack}"
        self._journal.emit("silent", unit=label, worker=self.setup(slot).name, detail=detail)

    def record_peaks(self, answers: Sequence[Any]) -> None:
        """Record the highest memory peak that workers report."""
        self.peak_bytes = max([self.peak_bytes, *(a.peak_bytes for a in answers)])

    @contextlib.contextmanager
    def vacated(self) -> Iterator[None]:
        """End all workers for a block, which can use what they held; then start others.

        No call may be running. After a block that raises the pool stays empty: the run ends.
        """
        num_workers = len(self._slots)
        self.close()
        yield
        self._draining.clear()
        self._slots = [self._filled(slot) for slot in range(num_workers)]

    def close(self) -> None:
        """End all workers, and withdraw the resource request from the cluster."""
        if self._has_requested:
            self.executor.request_resources([])
            self._has_requested = False
        for slot in self._slots:
            self.executor.kill(slot.handle)
        self._slots = []

    def _filled(self, slot: int) -> _Slot:
        setup = WorkerSetup(
            name=f"worker-{slot}",
            incarnation=uuid4().hex[:12],
            threads=self._pattern.threads,
            device=self._pattern.device,
        )
        name = f"{setup.name}-{setup.incarnation}"
        handle = self.executor.spawn(Stage, setup, resources=self._resources, name=name)
        return _Slot(setup, handle, self.executor.locate(handle), time.monotonic())

    def _arrive(self, slot: _Slot) -> None:
        try:
            slot.where = self.executor.result(slot.locating)
        except (WorkerLost, CompressionError):
            slot.where = ActorLocation()  # lost at start: its first call will fail
        if slot.announced:
            waited = time.monotonic() - slot.since
            self._journal.emit("placed", worker=slot.setup.name, seconds=waited)

    def _wait_for_places(self, needed: list[int]) -> None:
        """Announce workers that are waited for; give up after waiting too long.

        Raises:
            ClusterError: no machine had room for a worker for too long.
        """
        now = time.monotonic()
        late = [
            n
            for n, s in enumerate(self._slots)
            if s.where is None and now - s.since > ANNOUNCE_SECONDS
        ]
        for number in late:
            slot = self._slots[number]
            if not slot.announced:
                slot.announced = True
                self._request_room()
                self._journal.emit("waiting", worker=slot.setup.name, detail=self._shortage())
        essential = [n for n in late if n in needed] if needed else late
        unplaced = [n for n in essential if now - self._slots[n].since > self._place_seconds]
        if unplaced and (needed or len(unplaced) == len(self._slots)):
            raise ClusterError(
                f"no machine had room for {self._slots[unplaced[0]].setup.name} within "
                f"{self._place_seconds:.0f} s: {self._shortage()}",
                hint=f"add a machine, or use fewer --workers; {RESUME_HINT}",
            )

    def _shortage(self) -> str:
        return f"needs {self._resources}; {self.executor.capacity()}"

    def _check_draining(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < DRAIN_SECONDS:
            return
        self._checked_at = now
        draining = self.executor.draining()
        for number, slot in enumerate(self._slots):
            if slot.where is None or slot.where.node not in draining or number in self._draining:
                continue
            left = draining[slot.where.node]
            self._draining[number] = now + left
            self._journal.emit("notice", worker=slot.setup.name, seconds=min(left, 1e9),
                               detail=f"its node is preempted in {left:.0f} s")  # fmt: skip
            self._request_room()

    def _request_room(self) -> None:
        """Request room for all workers, and for one more for each on a draining node."""
        bundles = [self._resources.bundle] * (len(self._slots) + len(self._draining))
        self.executor.request_resources(bundles)
        self._has_requested = True
