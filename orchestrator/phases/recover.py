"""Recover: train the compressed model on text, and keep the better of the two."""

import math
import time
from dataclasses import replace

from actors.messages import TrainRequest, UnitDone
from actors.storage.tokens import tokens_from_parquet
from orchestrator.engine.group_training import train_together
from orchestrator.phases.context import RunContext
from orchestrator.phases.evaluate import Loss, evaluation_plan, loss_of
from orchestrator.phases.recovery_text import write_text
from orchestrator.phases.stitch import stitch_in
from orchestrator.prepare.evaluation_plan import EvaluationPlan, Subject
from orchestrator.prepare.prepared import dense_subject, teacher_of
from orchestrator.prepare.recovery import text_units
from orchestrator.rundir.layout import RECOVERY_TOKENS
from planners.canonical_json import fingerprint
from planners.errors import NumericsError
from planners.recovery import SHRUNK, STOP, TRAINED
from planners.units.kinds import KINDS
from planners.units.units import RecoveryUnits, Unit, needed


def recover(context: RunContext) -> None:
    """Train the compressed model if the recipe asks for it, and make the better one the result.

    Raises:
        CompressionError: see `RunContext.do`; or the training diverged. The model before it stays
            in `SHRUNK`, a checkpoint that loads.
    """
    units = context.recovering
    if units is None:
        return
    left = context.ledger.todo(units.kept)
    if not left:
        return
    steps = [u for u in needed(units.all, done=context.ledger.done) if KINDS[u.kind].counts]
    if context.prepared.recovery_tokens is None:
        steps += [u for u in text_units(context.prepared) if not context.ledger.done(u)]
    try:
        with context.phase("recover", total=len(steps)):
            _recover(context, units)
    except NumericsError as error:
        where = f"the model as it was before is in {context.run.below(SHRUNK.rstrip('/'))}"
        raise NumericsError(str(error), hint=f"{error.hint}; {where}".lstrip("; ")) from error


def _recover(context: RunContext, units: RecoveryUnits) -> None:
    shrunk = _subject(context, SHRUNK, context.shrunk)
    write_text(context)
    if units.training is None:
        context.do(needed(units.by_layer, done=context.ledger.done), tokens=RECOVERY_TOKENS)
    else:
        _train(context, units.training, shrunk)
        context.do(units.trained)
    _choose(context, units, shrunk)
    context.do(units.kept)


def recovery_losses(context: RunContext) -> tuple[dict[str, Loss], bool]:
    """Return the held-out losses before and after the training, and if the trained one is used."""
    assert context.recovering is not None  # asked only then
    values = context.ledger.record(context.recovering.choice).values
    nats, num_tokens, used = values["nats"], values["num_tokens"], values["used"]
    assert isinstance(nats, dict)  # written by `_choose`
    assert isinstance(num_tokens, int)
    known = {n: math.inf if each is None else each for n, each in nats.items()}
    return {n: Loss(nats=each, num_tokens=num_tokens) for n, each in known.items()}, bool(used)


def _subject(context: RunContext, folder: str, units: tuple[Unit, ...]) -> Subject:
    """Make a checkpoint of the files of units in a folder; return it as a subject of evaluation."""
    stitch_in(context, folder, units)
    name = folder.rstrip("/")
    identity = fingerprint([unit.fingerprint for unit in units])
    return Subject(name=name, uri=context.run.below(name), identity=identity)


def _train(context: RunContext, unit: Unit, shrunk: Subject) -> None:
    """Let a group of workers train the whole model, in place of those that do units."""
    if not context.ledger.todo([unit]):
        return
    prepared, job = context.prepared, context.job()
    recovery, teacher = prepared.recovery, teacher_of(prepared)
    assert recovery is not None  # there is a unit
    request = TrainRequest(
        unit=unit.name,
        fingerprint=unit.fingerprint,
        run_uri=context.run.uri,
        student_uri=shrunk.uri,
        checkpoint_uri=teacher.uri,
        recovery=recovery,
        tokens=RECOVERY_TOKENS,
        dtype=job.batching.dtype,
        threads=prepared.config.threads,
        device=prepared.config.device,
        save_every=prepared.config.recover.save_steps,
        stop=STOP,
        contents=teacher.contents,
        model_store=teacher.model_store,
        input_uri=dense_subject(prepared).uri if prepared.teacher else "",
        divided=prepared.plan.training_workers > 1,
    )
    workers = prepared.plan.training_workers, min(prepared.config.workers, recovery.parts)
    done = train_together(context, request, workers=workers)
    context.ledger.commit(unit, done, attempt=1)
    context.journal.emit(unit.kind, unit=unit.name, worker=done.worker,
                         start=done.started, seconds=done.seconds)  # fmt: skip


def _choose(context: RunContext, units: RecoveryUnits, shrunk: Subject) -> None:
    """Measure the held-out loss of both models as they are stored, and record which is better."""
    unit = units.choice
    if not context.ledger.todo([unit]):
        return
    started, begun = time.time(), time.monotonic()
    trained = _subject(context, TRAINED, units.trained)
    plan = _held_out_plan(context)
    before = loss_of(context, plan, shrunk)
    try:
        after = loss_of(context, plan, trained).nats
    except NumericsError:  # it is no number in the dtype in which the model is stored
        after = None
    values = {
        "nats": {shrunk.name: before.nats, trained.name: after},
        "num_tokens": before.num_tokens,
        "used": after is not None and after < before.nats,
    }
    done = UnitDone(unit=unit.name, worker="driver", incarnation="", device="", files=(),
                    values=values, started=started, seconds=time.monotonic() - begun)  # fmt: skip
    context.ledger.commit(unit, done, attempt=1)


def _held_out_plan(context: RunContext) -> EvaluationPlan:
    """Return how the held-out sequences are evaluated: as the evaluation data is."""
    prepared = context.prepared
    plan = evaluation_plan(prepared)
    assert prepared.recovery is not None  # asked only then
    ids = tokens_from_parquet(context.run.read(RECOVERY_TOKENS))
    held = prepared.recovery.held_out
    batching = replace(plan.batching, sequences=held, sequence_length=ids.shape[1])
    return replace(
        plan,
        batching=batching,
        tokens=RECOVERY_TOKENS,
        first=len(ids) - held,
        tokens_hash=prepared.recovery_hash,
    )
