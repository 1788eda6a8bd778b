"""Several methods in one run: a chain of steps, each beginning with what the one before has left.

Every step but the last works in a directory of its own, ``steps/1-modegpt`` and so on, and leaves
a checkpoint there; the last one is the run itself. When a step is done it leaves one record,
``step``, with its widths and what was found, so that whatever comes after is known without its
files. They are dropped when the next step is done; if they are wanted again, the same units make
them again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.messages import UnitDone
from actors.storage.files import Directory
from actors.storage.tokens import tokens_to_parquet
from orchestrator.phases.calibrate import tell_missing
from orchestrator.phases.context import RunContext
from orchestrator.phases.open_run import write_plan
from orchestrator.phases.outcome import step_facts
from orchestrator.phases.repair import corrupt_files, repair_result, skip_unneeded
from orchestrator.phases.shrink import shrink
from orchestrator.phases.stitch import code_hash, stitch_unit
from orchestrator.prepare.prepared import Prepared, revisions
from orchestrator.prepare.steps import StepInput, planned
from orchestrator.rundir.layout import CALIBRATION_TOKENS, passed_files
from orchestrator.rundir.ledger import Ledger
from planners.canonical_json import SCHEMA_VERSION, fingerprint, to_json
from planners.model.form import model_form_from_json
from planners.steps import is_pure_rotation
from planners.units.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a step's statistics come from.

    Attributes:
        how: ``measured``, ``reused`` or ``turned``.
        why: in words.
    """

    how: str
    why: str


def run_earlier_steps(context: RunContext) -> RunContext:
    """Return a run's context with the input of its last step known, and there where it is needed.

    The steps before it are done, as far as they are not. A run of one method is as it was.

    Raises:
        CompressionError: see `planners.errors`; what is done is kept.
    """
    prepared = context.prepared
    if not prepared.former:
        return context
    chain = [_first(context)]
    for step in (*prepared.former[1:], prepared):
        chain[-1] = _recorded(chain[-1]) or _run_step(chain)
        chain.append(_next_context(chain[-1], step, context))
    known = _recorded(chain[-1])
    if known is not None:
        # Its input is gone: where the result has a wrong byte, that must be made again first.
        corrupt_files(known)
        skip_unneeded(known)
    if known is None or not _is_whole(known):
        _ensure_model(chain[:-1])
        _tell(chain[-1])
        _carry(chain[-1])
    return chain[-1]


def finish_steps(context: RunContext) -> None:
    """Note that the last of several steps is stitched, and drop what only it needed."""
    if context.prepared.former:
        _record(context)
        for step in context.prepared.former:
            _drop(step)


def _first(context: RunContext) -> RunContext:
    step = context.prepared.former[0]
    said = Origin(how="measured", why="on the input model")
    return replace(
        context,
        prepared=step,
        form=step.plan.form,
        run=step.run,
        ledger=_ledger(step, context),
        steps=(_facts(step, said),),
    )


def _next_context(done: RunContext, step: Prepared, context: RunContext) -> RunContext:
    """Return the context of a step whose input is what a finished step has left."""
    before, form = done.prepared, done.form
    uri, revision = before.model_uri, before.revision
    source = StepInput(config=before.model_config, shape=before.plan.shape, start=before.start)
    reuse, turned = "", None
    number, name = len(done.steps), before.spec.name
    if done.is_idle:
        reuse = before.statistics_uri or before.run.uri
        origin = Origin(how="reused", why=f"step {number}, {name}, removed nothing")
    else:
        source = source.after(form)
        uri, revision = before.run.below("model"), stitch_unit(done).fingerprint
        if before.carries and is_pure_rotation(before.plan.shape, form, before.spec):
            turned = done
            why = f"step {number}, {name}, only turned the residual stream"
            origin = Origin(how="turned", why=why)
        else:
            why = f"step {number}, {name}, changed {', '.join(before.spec.shrinks(before.options))}"
            origin = Origin(how="measured", why=why)
    plan = planned((step.spec, step.options), step.config.target, source, step.work, path="")
    # Workers were started for the stages that were planned at the door.
    plan = replace(
        plan,
        waves=step.plan.waves,
        chains=step.plan.chains,
        worker_bytes=step.plan.worker_bytes,
    )
    identity = replace(step.identity, model_revision=revision)
    found = replace(
        step,
        former=(*before.former, before),
        model_uri=uri,
        model_config=source.config,
        revision=revision,
        contents=before.contents if uri == before.model_uri else {},
        start=source.start,
        plan=plan,
        identity=identity,
        statistics_uri=reuse,
    )
    is_last = step.run.uri == context.run.uri
    return replace(
        context,
        prepared=found,
        form=plan.form,
        makers=(),
        run=step.run,
        ledger=context.ledger if is_last and not reuse else _ledger(found, context),
        turned=turned,
        steps=(*done.steps, _facts(found, origin)),
    )


def _run_step(chain: Sequence[RunContext]) -> RunContext:
    """Do the last of these steps and record it; return it with its final widths."""
    context, before = chain[-1], chain[:-1]
    prepared = context.prepared
    _ensure_model(before)
    _open(context)
    _tell(context)
    _carry(context)
    tell_missing(context)
    context = shrink(context)
    if not context.is_idle:
        repair_result(context)
        _record(context)
        for step in prepared.former:
            _drop(step)
    else:  # what it leaves is its input, which stays
        context.journal.emit(
            "step",
            unit=f"step {len(context.steps)}, {prepared.spec.name}",
            detail="removes nothing and writes nothing: what it leaves is what it began with",
        )
        _record(context)
    return _recorded(context) or context


def _ensure_model(chain: Sequence[RunContext]) -> None:
    """See that the model that the last of these steps leaves is there, with its statistics."""
    if not chain:
        return
    context = chain[-1]
    if context.is_idle:
        _ensure_model(chain[:-1])
    elif not _is_whole(context):
        _run_step(chain)


def _carry(context: RunContext) -> None:
    """Turn the statistics of the step before into those of this one, where they follow."""
    if context.turned is None:
        return
    left = context.ledger.todo(context.sums)
    if left:
        with context.phase("calibrate", total=len(left)):
            context.do(context.sums)


def _open(context: RunContext) -> None:
    """Write what makes a step's directory one that others can read statistics from."""
    prepared, run = context.prepared, context.run
    write_plan(prepared)
    if run.size(CALIBRATION_TOKENS) is None:
        source = {"source": prepared.config.calibration.source}
        run.write(CALIBRATION_TOKENS, tokens_to_parquet(prepared.calibration, source))


def _tell(context: RunContext) -> None:
    said = context.steps[-1]
    words = {
        "measured": "calibrates" if len(context.steps) == 1 else "calibrates again",
        "reused": "takes the statistics that are there",
        "turned": "turns the statistics that are there",
    }[said["statistics"]]
    context.journal.emit(
        "step",
        unit=f"step {len(context.steps)}, {context.prepared.spec.name}",
        detail=f"{words}: {said['because']}",
    )


def _facts(step: Prepared, origin: Origin) -> dict[str, Any]:
    return {
        "name": step.spec.name,
        "options": dict(step.options),
        "modules": list(step.spec.shrinks(step.options)),
        "target": {k: v for k, v in step.asked().items() if k != "method"},
        "statistics": origin.how,
        "because": origin.why,
    }


def _unit(context: RunContext) -> Unit:
    """Return the unit that stands for a whole step."""
    prepared = context.prepared
    key = {
        "schema": SCHEMA_VERSION,
        "kind": "step",
        "sums": [unit.fingerprint for unit in context.sums],
        "identity": prepared.identity.key(),
        **prepared.asked(),
        "method revision": prepared.spec.revision,
        **({"candidates": found} if (found := revisions(prepared.spec)) else {}),
        "options": to_json(prepared.options),
        "start": to_json(prepared.start),
        "code": code_hash(),
    }
    return Unit(name="step", kind="step", index=-1, inputs=(), fingerprint=fingerprint(key))


def _record(context: RunContext) -> None:
    unit, prepared = _unit(context), context.prepared
    if context.ledger.done(unit):
        return
    found = (
        {
            "parameters": context.parameters_after,
            "keep_fraction": context.parameters_after / prepared.plan.parameters_before,
            "idle": True,  # it removed nothing
        }
        if context.is_idle
        else step_facts(context)
    )
    values = {"form": to_json(context.form), "found": found}
    if context.makers:
        values["makers"] = to_json(context.makers)
    done = UnitDone(unit=unit.name, worker="driver", incarnation="", device="", files=(),
                    values=values, started=0.0, seconds=0.0)  # fmt: skip
    context.ledger.commit(unit, done, attempt=1)


def _recorded(context: RunContext) -> RunContext | None:
    """Return a step that is done with its widths and what it found, or None."""
    unit = _unit(context)
    if not context.ledger.done(unit):
        return None
    values = context.ledger.record(unit).values
    form, found, makers = values["form"], values["found"], values.get("makers", ())
    assert isinstance(form, Mapping)  # written by ourselves
    assert isinstance(makers, Sequence)
    assert isinstance(found, Mapping)
    *before, last = context.steps
    return replace(
        context,
        form=model_form_from_json(form),
        makers=tuple(makers),
        steps=(*before, {**last, **found}),
    )


def _is_whole(context: RunContext) -> bool:
    """Return whether everything that a step has made is still there."""
    made = [unit for unit in context.made if unit.lasting]
    units = [*context.sums, *made, *context.refitting[1], stitch_unit(context)]
    return all(context.ledger.done(unit) for unit in units)


def _ledger(step: Prepared, context: RunContext) -> Ledger:
    reuse = Directory(step.statistics_uri) if step.statistics_uri else None
    return context.ledger.of_step(step.run, reuse=reuse)


def _drop(step: Prepared) -> None:
    """Remove what a step has left and nobody needs any more; its records stay."""
    for name in passed_files(step.run, keep_statistics=step.config.keep_statistics):
        step.run.delete(name)
