"""Text that the input model writes itself, to train its compressed model on.

The random number of a token is determined by the seed, its sequence and its position alone, and a
part has the same sequences in every run. So the text is the same whichever workers write it.
Sequences go on after an end-of-sequence token: all of them have the same length.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from actors.messages import Sampling, UnitDone
from actors.storage.tokens import Tokens, tokens_from_parquet, tokens_hash, tokens_to_parquet
from orchestrator.engine.generation import Prompts, Written, continue_prompts
from orchestrator.phases.calibrate import assignments
from orchestrator.phases.context import RunContext
from orchestrator.prepare.evaluation_plan import Subject
from orchestrator.prepare.self_text_plan import SelfTextPlan, self_text_plan
from planners.errors import DataError, NumericsError
from planners.overflow import OTHER_WEIGHTS, overflowed
from planners.units.units import Unit


def self_text(
    context: RunContext, subject: Subject, prompts: np.ndarray, *, length: int, seed: int
) -> Tokens:
    """Return prompts as a model continues them at temperature 1, (sequences, length), int64.

    Each part of them has a record and a file, such as ``tokens/self-text-part-00003.parquet``; a
    part that has them is not written again.

    Args:
        context: of the run, whose workers write.
        subject: the model.
        prompts: token ids, (sequences, tokens).
        length: tokens of each sequence in the end.
        seed: of the random numbers.

    Raises:
        PlanError: the prompts are too long, or the workers do not hold the whole model.
        NumericsError: a logit is not finite.
        KeyboardInterrupt: the user requested a stop; parts that were complete have records.
    """
    plan = self_text_plan(
        context.prepared, prompt_tokens=prompts.shape[1], length=length, seed=seed
    )
    units = plan.units(subject, prompts)
    context.ledger.todo(units)  # counts those that are resumed
    texts = {unit.name: text for unit in units if (text := _stored(context, unit)) is not None}
    left = {
        unit.name: (unit, rows)
        for unit, rows in zip(units, plan.rows(len(prompts)), strict=True)
        if unit.name not in texts
    }
    if left:
        texts |= _written(context, plan, subject, prompts, left)
    return np.concatenate([texts[unit.name] for unit in units])


def _stored(context: RunContext, unit: Unit) -> Tokens | None:
    """Return the text of a part that has a record; None without one, or if its file is damaged."""
    if not context.ledger.done(unit):
        return None
    record = context.ledger.record(unit)
    try:
        text = tokens_from_parquet(context.run.read(record.files[0].path))
        if tokens_hash(text) == record.values["sha256"]:
            return text
    except DataError:
        pass
    context.ledger.forget(unit)
    return None


def _written(
    context: RunContext,
    plan: SelfTextPlan,
    subject: Subject,
    prompts: np.ndarray,
    left: Mapping[str, tuple[Unit, tuple[int, int]]],
) -> dict[str, Tokens]:
    """Write the parts that have no record; return unit -> its text."""
    texts = {}

    def on_written(written: Written) -> None:
        unit, _ = left[written.prompts.unit]
        texts[unit.name] = written.ids
        _record(context, unit, written)

    held = assignments(
        plan.stages,
        run_uri=context.run.uri,
        checkpoint_uri=subject.uri,
        family=plan.family,
        dtype=plan.dtype,
        model_store=subject.model_store,
    )
    parts = [
        Prompts(
            unit=name,
            ids=prompts[slice(*rows)],
            length=plan.length,
            sampling=Sampling(seed=plan.seed, sequences=rows),
        )
        for name, (_, rows) in left.items()
    ]
    stages = [replace(each, contents=subject.contents) for each in held]
    try:
        continue_prompts(context.pool, stages, parts, on_written=on_written)
    except NumericsError as error:
        if plan.dtype != "float16":
            raise
        raise NumericsError(f"{error}{overflowed(plan.dtype)}", hint=OTHER_WEIGHTS) from error
    return texts


def _record(context: RunContext, unit: Unit, written: Written) -> None:
    """Write the file of a part, and then its record."""
    data = tokens_to_parquet(written.ids, {"source": "self"})
    entry = context.run.write(f"tokens/{unit.name}.parquet", data)
    values: dict[str, object] = {
        "sha256": tokens_hash(written.ids),
        "sequences": len(written.ids),
        "num_tokens": written.ids.size - written.prompts.ids.size,
    }
    if written.retried_after:
        values["retried_after"] = written.retried_after
    done = UnitDone(
        unit=unit.name,
        worker=written.worker,
        incarnation=written.incarnation,
        device=context.prepared.config.device,
        files=(entry,),
        values=values,
        started=written.started,
        seconds=written.seconds,
        peak_bytes=written.peak_bytes,
    )
    context.pool.record_peaks([done])
    context.ledger.commit(unit, done, attempt=written.attempt)
    context.journal.emit(
        unit.kind,
        unit=unit.name,
        worker=done.worker,
        start=done.started,
        seconds=done.seconds,
        tokens=written.ids.size - written.prompts.ids.size,
        peak_bytes=done.peak_bytes,
        written_bytes=done.written_bytes,
    )
