"""Continue prompts: parts of them run side by side, each on a chain of stages that is free.

A chain holds a whole model. Its stages keep keys and values; ids go from the last stage to the
first without the driver, which receives a copy. A part whose worker is lost begins again from its
prompts, on whichever chain is free first: its random numbers do not depend on that.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.messages import Assignment, Packed, Sampling, unpack
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.engine.failure_policy import FAILURES, Action, Place
from orchestrator.engine.stalls import PendingCalls
from orchestrator.engine.supervisor import Call
from orchestrator.engine.worker_pool import Pool

AHEAD = 8  # tokens that a chain is asked for before the first of them has arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Sequences that are continued together.

    Attributes:
        unit: its name.
        ids: (sequences, tokens), int64, at least one token.
        length: tokens of each sequence in the end.
        sampling: how the next ids are drawn.
    """

    unit: str
    ids: np.ndarray
    length: int
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Prompts that have been continued.

    Attributes:
        prompts: them.
        ids: (sequences, length), int64.
        worker: of the first stage.
        incarnation: of that worker.
        started: seconds since the epoch.
        seconds: it took, without failed tries.
        peak_bytes: the most that one of the workers held.
        attempt: 1 for the first try.
        retried_after: the classes of failures of the tries before.
    """

    prompts: Prompts
    ids: np.ndarray
    worker: str
    incarnation: str
    started: float
    seconds: float
    peak_bytes: int
    attempt: int
    retried_after: Sequence[str]


def continue_prompts(
    pool: Pool,
    assignments: Sequence[Assignment],
    parts: Sequence[Prompts],
    *,
    on_written: Callable[[Written], None],
) -> None:
    """Continue all parts; ``on_written`` is called with each as soon as it is complete.

    Args:
        pool: the workers; as many chains are used as it has room for.
        assignments: one a stage of a chain; together they are a whole model.
        parts: each is continued by one chain.
        on_written: gets each part once.

    Raises:
        CompressionError: a stage found broken weights or numbers, or too many workers were lost.
        KeyboardInterrupt: the user requested a stop; parts that were not complete are lost.
    """
    waiting, attempts = deque(parts), Counter[str]()
    count = min(len(parts), pool.num_workers // len(assignments))
    chains = [_Chain(pool, assignments, first_slot=n * len(assignments)) for n in range(count)]
    while waiting or any(chain.prompts is not None for chain in chains):
        if pool.interruption.requested:
            raise KeyboardInterrupt
        for chain in chains:
            chain.leave_draining_nodes(has_work=bool(waiting))
            if waiting and chain.prompts is None and chain.is_open:
                prompts = waiting.popleft()
                attempts[prompts.unit] += 1
                chain.begin(prompts, attempt=attempts[prompts.unit])
            chain.feed()
        tickets = [ticket for chain in chains for ticket in chain.tickets]
        # While one chain has all its workers, the work goes on without the others.
        is_running = any(chain.is_running for chain in chains)
        needed = [] if is_running else [slot for chain in chains for slot in chain.slots]
        answered = set(pool.ready(tickets, needed=needed))
        for chain in chains:
            written = chain.take(answered)
            if written is not None:
                on_written(written)
            waiting.extendleft(chain.given_back())


class _Chain:
    """The stages of a whole model, one in each of its slots, and the part they continue."""

    def __init__(self, pool: Pool, assignments: Sequence[Assignment], *, first_slot: int) -> None:
        self._pool, self._assignments = pool, assignments
        self.slots = range(first_slot, first_slot + len(assignments))
        self.prompts: Prompts | None = None
        self._pending = PendingCalls(pool)
        self._calls: dict[Any, tuple[int, Any]] = {}  # ticket -> slot, and that of its output
        self._loaded: set[int] = set()
        self._given_back: list[Prompts] = []
        self._attempt = 0
        self._reset()

    def _reset(self) -> None:
        """Forget the calls and the ids of a part."""
        self._calls = {}
        for slot in self.slots:
            self._pending.forget(slot)
        self._columns: list[np.ndarray] = []  # the ids of each position, (sequences,)
        self._asked = 0  # positions
        self._passing: Any = None
        self._peak_bytes = 0
        self._started, self._begun = time.time(), time.monotonic()

    @property
    def tickets(self) -> list[Any]:
        """All calls that have not answered, in order."""
        return list(self._calls)

    @property
    def is_running(self) -> bool:
        """Whether all its workers run."""
        return all(self._pool.is_running(slot) for slot in self.slots)

    @property
    def is_open(self) -> bool:
        """Whether all its workers run on nodes that are not draining."""
        return set(self.slots) <= set(self._pool.open_slots)

    def begin(self, prompts: Prompts, *, attempt: int) -> None:
        """Begin with a part; load the stages that are not loaded."""
        self._reset()
        self.prompts, self._attempt = prompts, attempt
        for slot, assignment in zip(self.slots, self._assignments, strict=True):
            if slot not in self._loaded:
                ticket = self._pool.call(slot, "load", assignment, label="load")
                self._note(slot, ticket, "load", None)

    def feed(self) -> None:
        """Ask for the next tokens, a few ahead of those that have arrived."""
        prompts = self.prompts
        if prompts is None or not self._loaded >= set(self.slots):
            return
        left = prompts.length - prompts.ids.shape[1]
        while self._asked < min(left, len(self._columns) + AHEAD):
            self._ask(prompts)

    def _ask(self, prompts: Prompts) -> None:
        """Send the prompts, or the ids drawn last, through all stages."""
        packed, start, kind = self._passing, prompts.ids.shape[1] + self._asked - 1, "token"
        if self._asked == 0:
            packed, start, kind = _packed(prompts.ids), 0, "prompt"
        for slot in self.slots:
            label = f"{prompts.unit} {kind} {start}"
            done, packed = self._pool.call(
                slot, "generate", packed, start, prompts.sampling, num_returns=2, label=label
            )
            self._note(slot, done, kind, packed)
        self._passing = packed
        self._asked += 1

    def _note(self, slot: int, ticket: Any, kind: str, output: Any) -> None:
        self._calls[ticket] = (slot, output)
        self._pending.begins(slot, ticket, f"self_text {kind}", f"{kind} in {self._name(slot)}")

    def take(self, answered: set[Any]) -> Written | None:
        """Process answers in the order of the calls; return the part if it is complete.

        The first call that failed is the reason why those that read its output failed.
        """
        for ticket in [ticket for ticket in self._calls if ticket in answered]:
            slot, output = self._calls[ticket]
            try:
                self._accept(slot, self._pool.executor.result(ticket), output)
            except FAILURES as error:
                self._fail(slot, error)
                return None
            del self._calls[ticket]
            self._pending.answered(slot, ticket)
        self._give_up_stalled()
        return self._complete()

    def _accept(self, slot: int, done: Any, output: Any) -> None:
        if output is None:
            self._loaded.add(slot)
            return
        if slot == self.slots[-1]:
            ids = unpack(self._pool.executor.result(output), device="cpu")
            self._columns.append(ids[:, 0].numpy())
        self._peak_bytes = max(self._peak_bytes, done.held_bytes)

    def _complete(self) -> Written | None:
        prompts = self.prompts
        if prompts is None or prompts.ids.shape[1] + len(self._columns) < prompts.length:
            return None
        self.prompts = None
        setup = self._pool.setup(self.slots[0])
        return Written(
            prompts=prompts,
            ids=np.concatenate([prompts.ids, np.stack(self._columns, axis=1)], axis=1),
            worker=setup.name,
            incarnation=setup.incarnation,
            started=self._started,
            seconds=time.monotonic() - self._begun,
            peak_bytes=self._peak_bytes,
            attempt=self._attempt,
            retried_after=self._pool.supervisor.finish(prompts.unit),
        )

    def given_back(self) -> list[Prompts]:
        """Return the part that this chain has failed or left, once."""
        found, self._given_back = self._given_back, []
        return found

    def leave_draining_nodes(self, *, has_work: bool) -> None:
        """Move to other nodes, unless the part is likely to be complete before they are gone."""
        draining = {slot: self._pool.seconds_left(slot) for slot in self.slots}
        least = min((left for left in draining.values() if left is not None), default=None)
        is_busy = self.prompts is not None
        if least is None or not (is_busy or has_work) or (is_busy and self._fits(least)):
            return
        for slot, left in draining.items():
            if left is not None:
                self._pool.leave_node(slot)
                self._loaded.discard(slot)
        self._give_back()

    def _fits(self, seconds: float) -> bool:
        """Return whether the part is likely to be complete within so many seconds."""
        assert self.prompts is not None  # asked only of a busy chain
        done = len(self._columns)
        left = self.prompts.length - self.prompts.ids.shape[1] - done
        return done > 0 and (time.monotonic() - self._begun) / done * left < seconds

    def _give_up_stalled(self) -> None:
        """Replace the worker that the others wait for, if it has not answered for too long."""
        for slot, _ in list(self._calls.values())[:1]:
            if self._pending.stalled(slot):
                label = self._pending.label(slot)
                self._fail(slot, WorkerLost(FailureClass.STALLED, f"{label} did not answer"))

    def _fail(self, slot: int, error: Exception) -> None:
        """Give the part back, and replace the worker where that is needed.

        Raises:
            CompressionError: the run stops.
        """
        assert self.prompts is not None  # there was a call
        call = Call(name=self.prompts.unit, place=Place.STAGE, worker=self._name(slot))
        if self._pool.supervisor.handle(call, error) is Action.REPLACE:
            self._pool.replace(slot, error)
            self._loaded.discard(slot)
        self._give_back()

    def _give_back(self) -> None:
        if self.prompts is not None:
            self._given_back.append(self.prompts)
        self.prompts = None
        self._reset()

    def _name(self, slot: int) -> str:
        return self._pool.setup(slot).name


def _packed(ids: np.ndarray) -> Packed:
    flat = np.ascontiguousarray(ids, dtype=np.int64).reshape(-1)
    return Packed(shape=ids.shape, dtype="int64", buffer=flat.view(np.uint8))
