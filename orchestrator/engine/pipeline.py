"""A pass: microbatches stream through the stages of a wave in order, and survive lost workers.

One thread feeds bounded queues. A stage always sums microbatches in order: when a worker is lost,
its replacement loads the same layers and resumes from their newest partial sums, or from the first
microbatch. Missing activations are recomputed by the earlier stages, back to the nearest one that
still has them. A stage passes on what it has already summed without summing it twice, so the sums
are the same bits as without the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from actors.messages import Assignment, Microbatch, ResumeSums, StepDone, UnitDone, UnitTask
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.engine.failure_policy import FAILURES, Action, Place
from orchestrator.engine.partial_sums import BYTES_PER_SECOND, Partials, interval
from orchestrator.engine.reproduce import PassCall, Reproducer
from orchestrator.engine.stalls import PendingCalls
from orchestrator.engine.supervisor import Call
from orchestrator.engine.worker_pool import Pool
from planners.units.flow import Flow, accept, submissions


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """How often a pass saves partial sums.

    Attributes:
        partials: the partial sums of the run.
        every: microbatches between two saves; 0 is never, ``by cost`` uses
            `orchestrator.engine.partial_sums.interval`.
        stage_bytes: what each stage writes.
    """

    partials: Partials
    every: int | Literal["by cost"]
    stage_bytes: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """The stages, inputs and outputs of one pass.

    Attributes:
        kind: ``calibrate`` or ``evaluate``, as shown to users.
        assignments: one per stage, in order.
        microbatches: the inputs, in order; the index is the position in this sequence.
        publish: for each stage, the units it publishes after all microbatches.
        saving: of the sums before they are published; None if there are no sums.
    """

    kind: str
    assignments: Sequence[Assignment]
    microbatches: Sequence[Microbatch]
    publish: Sequence[Sequence[UnitTask]]
    saving: Saving | None = None


@dataclass(slots=True)
class _StageState(Flow):
    """The state of one stage: its flow, and its calls that load, save and publish.

    Attributes:
        saved: microbatches that are in its newest partial sums.
        publishing: ticket -> the unit whose sums a call begins to write, or waits for.
        to_publish: units to publish once everything is summed.
        loading: ticket, while layers are being loaded.
        saving: ticket, while partial sums are being written.
        save_seconds: duration of the last save, or 0.
    """

    saved: int = 0
    publishing: dict[Any, UnitTask] = field(default_factory=dict)
    to_publish: list[UnitTask] = field(default_factory=list)
    loading: Any = None
    saving: Any = None
    save_seconds: float = 0.0

    @property
    def tickets(self) -> list[Any]:
        """All calls that have not answered."""
        single = [t for t in (self.loading, self.saving) if t is not None]
        return [*single, *self.inflight, *self.publishing]


class Pass:
    """One `PassPlan` on the workers of a chain: one slot of the pool for each of its stages."""

    def __init__(
        self,
        pool: Pool,
        plan: PassPlan,
        *,
        first_slot: int = 0,
        on_step: Callable[[int, Microbatch, StepDone], None],
        on_published: Callable[[UnitTask, UnitDone], None],
    ) -> None:
        """Prepare a pass; ``on_step`` is called with the stage's number in the chain, from 0."""
        self._pool, self._plan = pool, plan
        self._on_step, self._on_published = on_step, on_published
        self._stages = [_StageState(to_publish=list(units)) for units in plan.publish]
        self._slots = range(first_slot, first_slot + len(self._stages))
        self._pending = PendingCalls(pool)
        self._reported: set[tuple[int, int]] = set()
        self._failed_calls: set[str] = set()

    @property
    def slots(self) -> range:
        """The slots of its stages, in order."""
        return self._slots

    @property
    def tickets(self) -> list[Any]:
        """All calls that have not answered."""
        return [ticket for stage in self._stages for ticket in stage.tickets]

    @property
    def finished(self) -> bool:
        """Whether every stage has seen every microbatch and published all its units."""
        total = len(self._plan.microbatches)
        return all(
            stage.done == total and not (stage.to_publish or stage.tickets)
            for stage in self._stages
        )

    def begin(self) -> None:
        """Start loading the layers of all stages."""
        for at in range(len(self._stages)):
            self._load(at)

    def _call(self, at: int, kind: str, method: str, *args: Any, label: str, **how: Any) -> Any:
        answers = self._pool.call(self._slots[at], method, *args, label=label, **how)
        ticket = answers[0] if isinstance(answers, tuple) else answers
        self._pending.begins(self._slots[at], ticket, f"{self._plan.kind} {kind}", label)
        return answers

    def _load(self, at: int) -> None:
        assignment, stage = self._plan.assignments[at], self._stages[at]
        layers = frozenset(unit.index for unit in stage.to_publish)
        partials = self._plan.saving.partials.found(layers) if self._plan.saving else ()
        stage.loading = self._call(
            at, "load", "load", assignment, ResumeSums(layers=layers, partials=partials),
            label=f"load[{self._layers(at)}]",
        )  # fmt: skip

    def feed(self) -> None:
        """Make every call that can be made now."""
        total = len(self._plan.microbatches)
        for at, stage in enumerate(self._stages):
            stage.paused, stage.starting = self._pauses(at), stage.loading is not None
        for at, index in submissions(self._stages, total):
            self._submit(at, index)
        for at, stage in enumerate(self._stages):
            if self._saves(at):
                stage.saving = self._call(at, "save", "save", label=f"save[{self._layers(at)}]")
            if stage.done == total and stage.loading is None:
                self._publish(at)
            if self._leaves(at):
                self._pool.leave_node(self._slots[at])
                self._restart(at)

    def _publish(self, at: int) -> None:
        """Write the sums of all layers: each is copied while those of earlier layers are written.

        The first call of a unit answers when its sums are on their way, the second when its file is
        durable.
        """
        stage = self._stages[at]
        for unit, before in zip([*stage.to_publish, None], [None, *stage.to_publish], strict=True):
            if unit is not None:
                ticket = self._call(at, "publish", "publish", unit, label=unit.unit)
                stage.publishing[ticket] = unit
            if before is not None:
                label = f"{before.unit} files"
                ticket = self._call(at, "publish", "written", before.unit, label=label)
                stage.publishing[ticket] = before
        stage.to_publish = []

    def _pauses(self, at: int) -> bool:
        """Return whether a stage gets no new microbatch for now."""
        draining = self._pool.seconds_left(self._slots[at]) is not None
        return draining or self._stages[at].loading is not None or self._pool.interruption.requested

    def _saves(self, at: int) -> bool:
        """Return whether the sums of a stage should be saved now."""
        stage, saving = self._stages[at], self._plan.saving
        unsaved = stage.done - stage.saved
        busy = stage.saving is not None or stage.loading is not None
        if saving is None or saving.every == 0 or not unsaved or busy or not stage.to_publish:
            return False
        if stage.done == len(self._plan.microbatches):
            return False  # they are about to be published
        left = self._pool.seconds_left(self._slots[at])
        seconds = stage.save_seconds or saving.stage_bytes[at] / BYTES_PER_SECOND
        if left is not None:
            return not stage.inflight and seconds < left
        if self._pool.interruption.requested:
            return not stage.inflight
        if saving.every != "by cost":
            return unsaved >= saving.every
        step = self._pool.deadlines.expected(f"{self._plan.kind} step")
        return step is not None and unsaved >= interval(step_seconds=step, save_seconds=seconds)

    def _leaves(self, at: int) -> bool:
        """Return whether a stage leaves its draining node now: it has no call worth waiting for."""
        stage, left = self._stages[at], self._pool.seconds_left(self._slots[at])
        if left is None or (not stage.tickets and not stage.to_publish and self._over(at)):
            return False
        return not stage.tickets or not self._fits(at, left)

    def _over(self, at: int) -> bool:
        """Return whether this stage and all later ones are done."""
        total = len(self._plan.microbatches)
        return all(stage.done == total for stage in self._stages[at:])

    def _fits(self, at: int, left: float) -> bool:
        """Return whether a stage's current call is likely to end before its node is preempted."""
        return self._pending.fits(self._slots[at], left)

    def _submit(self, at: int, index: int) -> None:
        stage = self._stages[at]
        packed = self._stages[at - 1].outputs[index] if at > 0 else None
        done, output = self._call(
            at, "step", "step", self._as_sent(at, index), packed, num_returns=2,
            label=f"{self._plan.kind}[{self._layers(at)}] mb {index}",
        )  # fmt: skip
        stage.submit(done, index, output)

    def _as_sent(self, at: int, index: int) -> Microbatch:
        microbatch = self._plan.microbatches[index]
        last = at == len(self._stages) - 1
        return replace(
            microbatch,
            hand_over=not last,
            read_boundary=microbatch.read_boundary if at == 0 else "",
            write_boundary=microbatch.write_boundary if last else "",
        )

    def _layers(self, at: int) -> str:
        assignment = self._plan.assignments[at]
        return f"layers {assignment.first}-{assignment.last - 1}"

    def take(self, ticket: Any) -> None:
        """Process the answer to a call, unless it belongs to another pass."""
        at = next((s for s, g in enumerate(self._stages) if ticket in g.tickets), None)
        if at is None:  # of another pass, or of a worker that was replaced in this round
            return
        publishes = ticket in self._stages[at].publishing
        self._pending.answered(self._slots[at], ticket, counts=not publishes)
        try:
            answer = self._pool.executor.result(ticket)
        except FAILURES as error:
            self._fail(at, ticket, error)
        else:
            self._accept(at, ticket, answer)

    def _accept(self, at: int, ticket: Any, answer: Any) -> None:
        stage = self._stages[at]
        if ticket is stage.loading:
            stage.loading = None
            if stage.to_publish:
                stage.next = stage.done = stage.saved = answer.next
        elif ticket is stage.saving:
            stage.saving = None
            self._accept_save(at, answer)
        elif ticket in stage.publishing:
            unit = stage.publishing.pop(ticket)
            if answer is not None:
                self._pending.took(f"{self._plan.kind} publish", answer.seconds)
                self._pool.record_peaks([answer])
                self._on_published(unit, answer)
        else:
            index = accept(self._stages, at, ticket)
            self._pool.record_peaks([answer])
            if (at, index) not in self._reported:
                self._reported.add((at, index))
                self._on_step(at, self._plan.microbatches[index], answer)

    def _accept_save(self, at: int, answer: Any) -> None:
        saving, stage = self._plan.saving, self._stages[at]
        assert saving is not None  # a save was requested
        self._pool.record_peaks([answer])
        saving.partials.accept(answer, worker=self._pool.setup(self._slots[at]).name)
        stage.save_seconds = answer.seconds
        stage.saved = min((p.next for p in answer.partials), default=stage.done)

    def give_up_stalled(self) -> None:
        """Replace the workers that have not answered for too long."""
        for at in range(len(self._stages)):
            if self._pending.stalled(self._slots[at]):
                label = self._pending.label(self._slots[at])
                lost = WorkerLost(FailureClass.STALLED, f"{label} did not answer")
                self._fail(at, self._pending.ticket(self._slots[at]), lost)

    def _fail(self, at: int, ticket: Any, error: Exception) -> None:
        """Continue with another worker, or with a recomputed input.

        Raises:
            CompressionError: the run stops.
        """
        call = self._failed(at, ticket)
        self._failed_calls.add(call.name)
        if self._pool.supervisor.handle(call, error) is Action.RETRY:
            self._lose_input(at, ticket)
        else:
            self._pool.replace(self._slots[at], error)
            self._restart(at)

    def end(self) -> None:
        """Reset the attempts of failed calls: the next pass has calls of the same names."""
        for name in self._failed_calls:
            self._pool.supervisor.finish(name)

    def _failed(self, at: int, ticket: Any) -> Call:
        """Return a call as the supervisor's `Call`, named by its layers and sequences."""
        stage, assignment = self._stages[at], self._plan.assignments[at]
        setup = self._pool.setup(self._slots[at])
        sent = None
        if ticket in stage.inflight:
            sent = self._as_sent(at, stage.inflight[ticket][0])
        where = "load" if sent is None else f"sequences-{sent.rows[0]}-{sent.rows[1] - 1}"
        return Call(
            name=f"{self._plan.kind}-layers-{assignment.first}-{assignment.last - 1}-{where}",
            place=Place.STAGE,
            worker=setup.name,
            reproducer=Reproducer(
                setup=setup, call=PassCall(assignment=assignment, microbatch=sent)
            ),
        )

    def _restart(self, at: int) -> None:
        """Resume a stage on its new worker from what is saved."""
        stage = self._stages[at]
        self._pending.forget(self._slots[at])
        stage.to_publish = [*dict.fromkeys(stage.publishing.values()), *stage.to_publish]
        stage.publishing, stage.saving = {}, None
        if stage.to_publish:  # sums were lost with the worker; published units stay done
            stage.saved = 0
        stage.restart(0 if stage.to_publish else stage.done)
        self._load(at)

    def _lose_input(self, at: int, ticket: Any) -> None:
        """Recompute a microbatch whose activations were lost with their node."""
        stage = self._stages[at]
        index, _ = stage.inflight.pop(ticket)
        self._stages[at - 1].outputs.pop(index, None)
        if index >= stage.done:  # later ones were not summed either: sums are taken in order
            stage.inflight = {t: call for t, call in stage.inflight.items() if call[0] < index}
            stage.next = index


def run_side_by_side(pool: Pool, passes: Sequence[Pass]) -> None:
    """Run passes side by side until all are finished; no two share a slot.

    Raises:
        CompressionError: a worker found broken input or numbers, or too many were lost.
        KeyboardInterrupt: the user requested a stop; unfinished work is saved.
    """
    for each in passes:
        each.begin()
    while unfinished := [each for each in passes if not each.finished]:
        _run_round(pool, unfinished)
    for each in passes:
        each.end()


def _run_round(pool: Pool, passes: Sequence[Pass]) -> None:
    """Make the calls of each pass that can be made now, and process the answers."""
    for each in passes:
        each.feed()
    tickets = [ticket for each in passes for ticket in each.tickets]
    if not tickets and pool.interruption.requested:
        raise KeyboardInterrupt
    needed = [slot for each in passes for slot in each.slots]
    for ticket in pool.ready(tickets, needed=needed):
        for each in passes:
            each.take(ticket)
    for each in passes:
        each.give_up_stalled()
