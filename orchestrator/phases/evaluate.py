"""Measure perplexity, through the same stages that calibrate."""

import math
from dataclasses import dataclass, replace

from actors.messages import Microbatch, StepDone, UnitDone, UnitTask
from orchestrator.engine.pipeline import Pass, PassPlan, run_side_by_side
from orchestrator.engine.work_context import WorkContext
from orchestrator.phases.calibrate import assignments, boundary_name
from orchestrator.prepare.evaluation_plan import (
    EXACT,
    TRIAL_SEQUENCES,
    EvaluationPlan,
    Subject,
    own_dtype,
)
from orchestrator.prepare.prepared import Prepared
from planners.batching import TokenBatching
from planners.calibration import shard_cuts
from planners.canonical_json import SCHEMA_VERSION, fingerprint
from planners.errors import NumericsError
from planners.overflow import OTHER_WEIGHTS, overflowed
from planners.units.units import Unit

AGREEMENT = 1e-4  # of two losses, relative to one of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Sum of -log p over the predicted tokens, in nats, and their number.

    Attributes:
        nats: the sum.
        num_tokens: how many were predicted.
        dtype: in which it was computed.
    """

    nats: float
    num_tokens: int
    dtype: str = EXACT

    @property
    def perplexity(self) -> float:
        """Exp of the mean; infinite where it leaves the floating point range."""
        mean = self.nats / self.num_tokens
        return math.exp(mean) if mean < math.log(1e300) else math.inf


def evaluation_plan(prepared: Prepared) -> EvaluationPlan:
    """Return how the models of a run are evaluated: in the stages that calibrate."""
    identity, shape = prepared.identity, prepared.plan.shape
    return EvaluationPlan(
        family=shape.family,
        waves=prepared.plan.waves,
        chains=prepared.plan.chains,
        batching=TokenBatching(
            sequences=len(prepared.evaluation),
            sequence_length=prepared.evaluation.shape[1],
            microbatch_sequences=identity.batching.microbatch_sequences,
            dtype=EXACT,
        ),
        tokens_hash=prepared.evaluation_hash,
        threads=identity.threads,
        device=identity.device,
        own_dtype=own_dtype(identity.device, shape.dtype),
    )


def settled(context: WorkContext, plan: EvaluationPlan, subject: Subject) -> EvaluationPlan:
    """Return the plan with the dtype in which all losses of a run are measured.

    Where that is a question, the first sequences are evaluated in float32 and in the model's own
    dtype. Their losses have records, so a run that resumes decides the same.

    Raises:
        NumericsError: the loss in float32 is not finite.
    """
    if not plan.own_dtype:
        return plan
    found = {}
    for dtype in (EXACT, plan.own_dtype):
        sequences = min(TRIAL_SEQUENCES, plan.batching.sequences)
        batching = replace(plan.batching, sequences=sequences, dtype=dtype)
        trial = replace(plan, batching=batching, chains=1)
        tried = replace(subject, name=f"trial-{dtype}")
        try:
            found[dtype] = _loss(context, trial, tried, _parts(trial, tried))
        except NumericsError:
            if dtype == EXACT:
                raise
            return plan  # the model's own dtype overflows
    dtype = plan.own_dtype if agree(found[EXACT], found[plan.own_dtype]) else EXACT
    return replace(plan, batching=replace(plan.batching, dtype=dtype))


def agree(exact: Loss, other: Loss) -> bool:
    """Return whether two losses of the same tokens differ by at most `AGREEMENT`, relatively."""
    return abs(other.nats - exact.nats) <= AGREEMENT * exact.nats


def evaluate(context: WorkContext, plan: EvaluationPlan, subject: Subject) -> Loss:
    """Return the loss of a model on the evaluation tokens; each part of them has a record.

    Raises:
        NumericsError: the loss of a part is not finite.
    """
    parts = _parts(plan, subject)
    left = len(context.ledger.todo([unit for unit, _ in parts]))
    stages = sum(map(len, plan.waves))
    with context.phase("evaluate", total=stages * left):
        return _loss(context, plan, subject, parts)


def loss_of(context: WorkContext, plan: EvaluationPlan, subject: Subject) -> Loss:
    """Return what `evaluate` does, within a phase that is going on.

    Raises:
        NumericsError: the loss of a part is not finite.
    """
    return _loss(context, plan, subject, _parts(plan, subject))


def _parts(plan: EvaluationPlan, subject: Subject) -> list[tuple[Unit, tuple[int, int]]]:
    """Return the units of an evaluation, each with its rows of the tokens."""
    rows = [(a + plan.first, b + plan.first) for a, b in plan.batching.microbatches]
    return [(_part(plan, subject, index, ab), ab) for index, ab in enumerate(rows)]


def _loss(
    context: WorkContext,
    plan: EvaluationPlan,
    subject: Subject,
    parts: list[tuple[Unit, tuple[int, int]]],
) -> Loss:
    """Return the loss of a model on these parts, after evaluating those that have no record."""
    left = [(unit, rows) for unit, rows in parts if not context.ledger.done(unit)]
    for number in range(len(plan.waves) if left else 0):
        _evaluate_wave(context, plan, (subject, number), left)
    values = [context.ledger.record(unit).values for unit, _ in parts]
    return Loss(
        nats=math.fsum(_number(v["nats"]) for v in values),
        num_tokens=int(sum(_number(v["num_tokens"]) for v in values)),
        dtype=plan.batching.dtype,
    )


def _evaluate_wave(
    context: WorkContext,
    plan: EvaluationPlan,
    what: tuple[Subject, int],
    left: list[tuple[Unit, tuple[int, int]]],
) -> None:
    wave = plan.waves[what[1]]
    cuts = shard_cuts(plan.chains, len(left))
    passes = [
        _evaluation_pass(context, plan, what, left, (chain * len(wave), cut_))
        for chain, cut_ in enumerate(cuts)
    ]
    run_side_by_side(context.pool, passes)
    into = wave[0].first
    if into:  # only now: a replacement worker starts from them again
        for number in range(len(left)):
            context.run.delete(boundary_name(f"evaluation-{what[0].name}", into, number))


def _evaluation_pass(
    context: WorkContext,
    plan: EvaluationPlan,
    what: tuple[Subject, int],
    left: list[tuple[Unit, tuple[int, int]]],
    chain: tuple[int, tuple[int, int]],
) -> Pass:
    """Return the pass of some parts through one chain, given as its first slot and its parts."""
    subject, wave = what[0], plan.waves[what[1]]
    first_slot, (start, stop) = chain
    into, out, last = wave[0].first, wave[-1].last, wave[-1].head
    stream = f"evaluation-{subject.name}"

    def on_step(at: int, microbatch: Microbatch, done: StepDone) -> None:
        unit = left[start + microbatch.index][0]
        context.journal.emit("evaluate", unit=unit.name, worker=f"worker-{first_slot + at}",
                             start=done.started, seconds=done.seconds,
                             tokens=done.num_tokens, peak_bytes=done.peak_bytes)  # fmt: skip
        if last and at == len(wave) - 1:
            context.ledger.commit(unit, _part_done(unit, done, plan.batching.dtype), attempt=1)

    def on_published(task: UnitTask, done: UnitDone) -> None:
        raise AssertionError(f"{task.unit}: an evaluation publishes nothing, not {done}")

    passing = PassPlan(
        kind="evaluate",
        assignments=[
            replace(each, contents=subject.contents)
            for each in assignments(
                wave,
                run_uri=context.run.uri,
                checkpoint_uri=subject.uri,
                family=plan.family,
                dtype=plan.batching.dtype,
                model_store=subject.model_store,
            )
        ],
        microbatches=[
            Microbatch(
                index=number - start,
                tokens=plan.tokens,
                rows=left[number][1],
                loss=last,
                read_boundary=boundary_name(stream, into, number) if into else "",
                write_boundary="" if last else boundary_name(stream, out, number),
            )
            for number in range(start, stop)
        ],
        publish=[[] for _ in wave],
    )
    return Pass(
        context.pool, passing, first_slot=first_slot, on_step=on_step, on_published=on_published
    )


def _part(plan: EvaluationPlan, subject: Subject, index: int, rows: tuple[int, int]) -> Unit:
    key = {
        "schema": SCHEMA_VERSION,
        "kind": "evaluation",
        "model": subject.identity,
        "tokens": plan.tokens_hash,
        "rows": list(rows),
        "dtype": plan.batching.dtype,
        "threads": plan.threads,
        "device": plan.device,
    }
    return Unit(
        name=f"evaluation-{subject.name}-part-{index:05d}",
        kind="evaluate",
        index=index,
        inputs=(),
        fingerprint=fingerprint(key),
    )


def _part_done(unit: Unit, done: StepDone, dtype: str) -> UnitDone:
    if not math.isfinite(done.nats):
        raise NumericsError(
            f"{unit.name}: the loss is not a finite number{overflowed(dtype)}",
            hint=OTHER_WEIGHTS if dtype == "float16" else "",
        )
    return UnitDone(
        unit=unit.name,
        worker="",
        incarnation=done.incarnation,
        device="",
        files=(),
        values={"nats": done.nats, "num_tokens": done.num_predicted},
        started=done.started,
        seconds=done.seconds,
    )


def _number(value: object) -> float:
    assert isinstance(value, int | float)  # written by our own units
    return value
