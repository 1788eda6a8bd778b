"""Load the result from its directory alone, in a fresh process, and check it."""

from collections.abc import Mapping
from typing import Any

from actors.messages import VerifyRequest
from orchestrator.engine.fresh_process import EvaluatorProcess
from orchestrator.phases.context import RunContext
from orchestrator.prepare.evaluation_plan import Subject
from orchestrator.prepare.model_config import quantised_modules
from planners.canonical_json import SCHEMA_VERSION, fingerprint
from planners.errors import NumericsError
from planners.overflow import OTHER_WEIGHTS
from planners.units.units import Unit

SEQUENCES, TOKENS = 2, 64  # that the result is run on
# Share of a worker's memory that the float32 model may take: it is held beside the stored one and
# activations.
FITS = 0.4


def verify(context: RunContext, subject: Subject, process: EvaluatorProcess) -> Mapping[str, Any]:
    """Return the checks of the written result.

    Raises:
        NumericsError: a check failed; the message says which, and the run is not marked READY.
    """
    key = {"schema": SCHEMA_VERSION, "kind": "verify", "of": subject.identity}
    unit = Unit(name="verify", kind="verify", index=-1, inputs=(), fingerprint=fingerprint(key))
    if not context.ledger.todo([unit]):
        return context.ledger.record(unit).values
    plan = context.prepared.plan
    memory = (context.prepared.config.worker_gib or 0) * 2**30
    request = VerifyRequest(
        uri=subject.uri,
        family=plan.shape.family,
        tensors=written_tensors(context),
        ids=context.prepared.evaluation[:SEQUENCES, :TOKENS].tolist(),
        whole=context.parameters_after * 4 < FITS * memory,
        schemes=quantised_modules(plan.shape, context.form),
    )
    with context.phase("verify", total=1):
        done = context.answered(process, unit, "verify", request)
        checks = done.values["checks"]
        assert isinstance(checks, list)  # written by our own evaluator
        failed = [c for c in checks if not c["passed"]]
        if failed:
            failures = "; ".join(f"{c['name']} ({c['detail']})" for c in failed)
            half = plan.shape.dtype == "float16"
            raise NumericsError(
                f"the result failed verification: {failures}", hint=OTHER_WEIGHTS if half else ""
            )
        context.ledger.commit(unit, done, attempt=1)
    return done.values


def written_tensors(context: RunContext) -> dict[str, Any]:
    """Return name -> sha256, shape and dtype of every tensor of the result, as computed."""
    tensors: dict[str, Any] = {}
    for unit in context.units:
        found = context.ledger.record(unit).values.get("tensors", {})
        assert isinstance(found, dict)  # written by our own units
        tensors |= found
    return tensors
