"""Several methods in one run: a chain of steps, each starting from the result of the one before.

Every step but the last works in a directory of its own, ``steps/1-modegpt`` and so on, and writes
a checkpoint there; the last one is the run itself. A finished step writes one record, ``step``,
with its widths and findings, so that later steps can be planned without its files. The files are
removed when the next step is done; if they are needed again, the same units recompute them.
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
from planners.steps import carries_cut, is_pure_rotation
from planners.units.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a step's statistics come from.

    Attributes:
        how: ``measured``, ``reused``, ``turned`` (rotated) or ``carried`` behind a cut.
        why: the reason, as text.
    """

    how: str
    why: str


def run_earlier_steps(context: RunContext) -> RunContext:
    """Return the context of a run's last step, whose input exists if it is needed.

    Earlier steps are run or resumed. The context of a run of one method is returned unchanged.

    Raises:
        CompressionError: see `planners.errors`; finished work is kept.
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
        # Its input was removed: if a file of the result is corrupt, the input is recomputed first.
        corrupt_files(known)
        skip_unneeded(known)
    if known is None or not _is_complete(known):
        _ensure_model(chain[:-1])
        _announce(chain[-1])
        _carry(chain[-1])
    return chain[-1]


def finish_steps(context: RunContext) -> None:
    """Record that the last of several steps is stitched, and remove what only it needed."""
    if context.prepared.former:
        _record(context)
        for step in context.prepared.former:
            _drop(step)


def _first(context: RunContext) -> RunContext:
    step = context.prepared.former[0]
    origin = Origin(how="measured", why="on the input model")
    return replace(
        context,
        prepared=step,
        form=step.plan.form,
        run=step.run,
        ledger=_ledger(step, context),
        steps=(_facts(step, origin),),
    )


def _next_context(done: RunContext, step: Prepared, context: RunContext) -> RunContext:
    """Return the context of a step whose input is the result of a finished step."""
    before, form = done.prepared, done.form
    uri, revision = before.model_uri, before.revision
    source = StepInput(config=before.model_config, shape=before.plan.shape, start=before.start)
    reuse, rotated = "", None
    number, name = len(done.steps), before.spec.name
    if done.is_idle:
        reuse = before.statistics_uri or before.run.uri
        origin = Origin(how="reused", why=f"step {number}, {name}, removed nothing")
    else:
        source = source.after(form)
        uri, revision = before.run.below("model"), stitch_unit(done).fingerprint
        if before.carries and is_pure_rotation(before.plan.shape, form, before.spec):
            rotated = done
            why = f"step {number}, {name}, only rotated the residual stream"
            origin = Origin(how="turned", why=why)
        elif before.carries and carries_cut(before.spec, step.spec):
            rotated = done
            why = f"step {number}, {name}, cut what {step.spec.name} rounds"
            origin = Origin(how="carried", why=why)
        else:
            why = f"step {number}, {name}, changed {', '.join(before.spec.shrinks(before.options))}"
            origin = Origin(how="measured", why=why)
    plan = planned((step.spec, step.options), step.config.target, source, step.work, path="")
    # Workers were started for the stages that were planned when the run was prepared.
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
        turned=rotated,
        steps=(*done.steps, _facts(found, origin)),
    )


def _run_step(chain: Sequence[RunContext]) -> RunContext:
    """Run the last of these steps and record it; return it with its final widths."""
    context, before = chain[-1], chain[:-1]
    prepared = context.prepared
    _ensure_model(before)
    _open(context)
    _announce(context)
    _carry(context)
    tell_missing(context, context.prepared.statistics_uri)
    context = shrink(context)
    if not context.is_idle:
        repair_result(context)
        _record(context)
        for step in prepared.former:
            _drop(step)
    else:  # its result is its input, which is kept
        context.journal.emit(
            "step",
            unit=f"step {len(context.steps)}, {prepared.spec.name}",
            detail="removes nothing and writes nothing: its result is its input",
        )
        _record(context)
    return _recorded(context) or context


def _ensure_model(chain: Sequence[RunContext]) -> None:
    """Recompute the result of the last of these steps, and its statistics, unless they exist."""
    if not chain:
        return
    context = chain[-1]
    if context.is_idle:
        _ensure_model(chain[:-1])
    elif not _is_complete(context):
        _run_step(chain)


def _carry(context: RunContext) -> None:
    """Carry the statistics of the step before over to this one, where that is possible."""
    if context.turned is None:
        return
    left = context.ledger.todo(context.sums)
    if left:
        with context.phase("calibrate", total=len(left)):
            context.do(context.sums)


def _open(context: RunContext) -> None:
    """Write the plan and tokens of a step's directory, so that later steps can reuse statistics."""
    prepared, run = context.prepared, context.run
    write_plan(prepared)
    if run.size(CALIBRATION_TOKENS) is None:
        source = {"source": prepared.config.calibration.source}
        run.write(CALIBRATION_TOKENS, tokens_to_parquet(prepared.calibration, source))


def _announce(context: RunContext) -> None:
    step = context.steps[-1]
    text = {
        "measured": "calibrates" if len(context.steps) == 1 else "calibrates again",
        "reused": "reuses the existing statistics",
        "turned": "rotates the existing statistics",
        "carried": "carries the existing statistics behind the cut",
    }[step["statistics"]]
    context.journal.emit(
        "step",
        unit=f"step {len(context.steps)}, {context.prepared.spec.name}",
        detail=f"{text}: {step['because']}",
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
    """Return the unit that represents a whole step."""
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
        "code": code_hash(prepared.plan.shape),
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
    """Return a finished step's context with its widths and findings, or None if it is not done."""
    unit = _unit(context)
    if not context.ledger.done(unit):
        return None
    values = context.ledger.record(unit).values
    form, found, makers = values["form"], values["found"], values.get("makers", ())
    assert isinstance(form, Mapping)  # written by `_record`
    assert isinstance(makers, Sequence)
    assert isinstance(found, Mapping)
    *before, last = context.steps
    return replace(
        context,
        form=model_form_from_json(form),
        makers=tuple(makers),
        steps=(*before, {**last, **found}),
    )


def _is_complete(context: RunContext) -> bool:
    """Return whether all files of a step still exist."""
    made = [unit for unit in context.made if unit.lasting]
    units = [*context.sums, *made, *context.refitting[1], stitch_unit(context)]
    return all(context.ledger.done(unit) for unit in units)


def _ledger(step: Prepared, context: RunContext) -> Ledger:
    reuse = Directory(step.statistics_uri) if step.statistics_uri else None
    return context.ledger.of_step(step.run, reuse=reuse)


def _drop(step: Prepared) -> None:
    """Remove a step's files, which nothing needs any more; its records are kept."""
    for name in passed_files(step.run, keep_statistics=step.config.keep_statistics):
        step.run.delete(name)
