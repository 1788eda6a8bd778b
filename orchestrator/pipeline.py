"""A pass: microbatches stream through the stages of a wave, in order, and survive lost workers.

One thread feeds bounded queues. A stage sums microbatches in order whatever happens: when a worker
is lost, its replacement loads the same layers and starts again, and whatever is lacking anywhere is
passed once more by the stages before, back to the nearest one that still has it. A stage passes on
what it has already summed without summing it twice, so the sums are the same bits as if nothing had
happened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.messages import Assignment, Microbatch, StepDone, UnitDone, UnitTask
from orchestrator.executors import InputLost, WorkerLost
from orchestrator.pool import Pool
from planners.flow import Flow, accept, submissions

POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """What one pass does.

    Attributes:
        kind: ``calibrate`` or ``evaluate``, as people see it.
        assignments: one a stage, in order.
        microbatches: what is fed, in order; the index is the position in this sequence.
        publish: for each stage, what it publishes when it has seen all microbatches.
    """

    kind: str
    assignments: Sequence[Assignment]
    microbatches: Sequence[Microbatch]
    publish: Sequence[Sequence[UnitTask]]


@dataclass(slots=True)
class _StageState(Flow):
    """Where one stage is, with what is published and loaded beside the flow.

    Attributes:
        publishing: ticket -> what is being published.
        to_publish: what is to be published once everything is summed.
        loading: ticket, while layers are being loaded.
    """

    publishing: dict[Any, UnitTask] = field(default_factory=dict)
    to_publish: list[UnitTask] = field(default_factory=list)
    loading: Any = None


class Pass:
    """Runs one `PassPlan` on the first workers of a pool."""

    def __init__(
        self,
        pool: Pool,
        plan: PassPlan,
        *,
        on_step: Callable[[int, Microbatch, StepDone], None],
        on_published: Callable[[UnitTask, UnitDone], None],
    ) -> None:
        self._pool, self._plan = pool, plan
        self._on_step, self._on_published = on_step, on_published
        self._stages = [_StageState(to_publish=list(units)) for units in plan.publish]
        self._told: set[tuple[int, int]] = set()

    def run(self) -> None:
        """Return when every stage has seen every microbatch and published what it should.

        Raises:
            CompressionError: a worker found broken input or numbers, or too many were lost.
        """
        for slot in range(len(self._stages)):
            self._load(slot)
        while not self._finished():
            self._feed()
            tickets = [t for stage in self._stages for t in self._tickets(stage)]
            for ticket in self._pool.executor.ready(tickets, seconds=POLL_SECONDS):
                self._take(ticket)

    def _finished(self) -> bool:
        total = len(self._plan.microbatches)
        return all(
            stage.done == total and not (stage.to_publish or stage.publishing or stage.loading)
            for stage in self._stages
        )

    def _tickets(self, stage: _StageState) -> list[Any]:
        loading = [stage.loading] if stage.loading is not None else []
        return [*loading, *stage.inflight, *stage.publishing]

    def _load(self, slot: int) -> None:
        assignment = self._plan.assignments[slot]
        label = f"load[layers {assignment.first}-{assignment.last - 1}]"
        self._stages[slot].loading = self._pool.call(slot, "load", assignment, label=label)

    def _feed(self) -> None:
        total = len(self._plan.microbatches)
        for slot, index in submissions(self._stages, total):
            self._submit(slot, index)
        for slot, stage in enumerate(self._stages):
            if stage.done == total:
                for unit in stage.to_publish:
                    ticket = self._pool.call(slot, "publish", unit, label=unit.unit)
                    stage.publishing[ticket] = unit
                stage.to_publish = []

    def _submit(self, slot: int, index: int) -> None:
        stage, assignment = self._stages[slot], self._plan.assignments[slot]
        last = slot == len(self._stages) - 1
        microbatch = self._plan.microbatches[index]
        here = replace(
            microbatch,
            hand_over=not last,
            read_boundary=microbatch.read_boundary if slot == 0 else "",
            write_boundary=microbatch.write_boundary if last else "",
        )
        packed = self._stages[slot - 1].outputs[index] if slot > 0 else None
        label = f"{self._plan.kind}[layers {assignment.first}-{assignment.last - 1}] mb {index}"
        done, output = self._pool.call(slot, "step", here, packed, num_returns=2, label=label)
        stage.submit(done, index, output)

    def _take(self, ticket: Any) -> None:
        slot = next((s for s, g in enumerate(self._stages) if ticket in self._tickets(g)), None)
        if slot is None:  # of a worker that was given up in this very round
            return
        try:
            answer = self._pool.executor.result(ticket)
        except WorkerLost as lost:
            self._restart(slot, lost)
        except InputLost:
            self._lose_input(slot, ticket)
        else:
            self._accept(slot, ticket, answer)

    def _accept(self, slot: int, ticket: Any, answer: Any) -> None:
        stage = self._stages[slot]
        if ticket is stage.loading:
            stage.loading = None
        elif ticket in stage.publishing:
            self._pool.saw([answer])
            self._on_published(stage.publishing.pop(ticket), answer)
        else:
            index = accept(self._stages, slot, ticket)
            self._pool.saw([answer])
            if (slot, index) not in self._told:
                self._told.add((slot, index))
                self._on_step(slot, self._plan.microbatches[index], answer)

    def _restart(self, slot: int, lost: WorkerLost) -> None:
        stage = self._stages[slot]
        self._pool.replace(slot, lost)
        stage.to_publish = [*stage.publishing.values(), *stage.to_publish]
        stage.publishing = {}
        # Sums went with the worker; what is published or told stays done.
        stage.restart(0 if stage.to_publish else stage.done)
        self._load(slot)

    def _lose_input(self, slot: int, ticket: Any) -> None:
        """Have a microbatch computed again whose activations went with their node."""
        stage = self._stages[slot]
        index, _ = stage.inflight.pop(ticket)
        self._stages[slot - 1].outputs.pop(index, None)
        if index >= stage.done:  # those behind it were not summed either: it was not their turn
            stage.inflight = {t: call for t, call in stage.inflight.items() if call[0] < index}
            stage.next = index
