"""A call in a process of its own, repeated where the process is lost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from actors.messages import UnitDone
from actors.worker.evaluator import Evaluator
from orchestrator.backend.executor import Executor, Resources, WorkerFailed, WorkerLost
from orchestrator.engine.failure_policy import (
    POLICIES,
    RESUME_HINT,
    Failures,
    class_of,
    final_error,
)
from orchestrator.engine.worker_pool import PLACE_SECONDS
from planners.errors import ClusterError


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshProcess:
    """A process for one unit, with its threads and device."""

    unit: str
    threads: int
    device: str


def _ignore(kind: str, **fields: Any) -> None:
    del kind, fields


def in_fresh_process(
    executor: Executor,
    fresh: FreshProcess,
    method: str,
    request: object,
    *,
    emit: Callable[..., None] = _ignore,
) -> UnitDone:
    """Return what an evaluator in a process of its own says to a request.

    One whose process is lost is followed by another; ``emit`` is told of it, as `Journal.emit` is.

    Raises:
        ClusterError: too many were lost.
        CompressionError: what the evaluator itself raised.
    """
    failures = Failures()
    while True:
        try:
            return _once_in_fresh_process(executor, fresh, method, request)
        except WorkerLost as lost:
            if failures.exhausted(fresh.unit, lost):
                raise ClusterError(
                    f"{fresh.unit}: its process was lost: {lost}",
                    hint=POLICIES[class_of(lost)].hint,
                ) from lost
            emit(class_of(lost), unit=fresh.unit, detail=str(lost))


def _once_in_fresh_process(
    executor: Executor, fresh: FreshProcess, method: str, request: object
) -> UnitDone:
    gpus = 1.0 if fresh.device == "cuda" else 0.0
    handle = executor.spawn(
        Evaluator,
        fresh.threads,
        fresh.device,
        resources=Resources(num_cpus=fresh.threads, num_gpus=gpus),
        name=f"evaluator-{fresh.unit}-{uuid4().hex[:8]}",
    )
    settling, since = executor.locate(handle), time.monotonic()
    try:
        ticket = executor.call(handle, method, fresh.unit, request, label=fresh.unit)
        while not executor.ready([settling], seconds=1.0):
            if time.monotonic() - since > PLACE_SECONDS:
                raise ClusterError(
                    f"{fresh.unit}: no machine could hold its process for {PLACE_SECONDS:.0f} s; "
                    f"{executor.capacity()}",
                    hint=RESUME_HINT,
                )
        while not executor.ready([ticket], seconds=1.0):
            pass
        done: UnitDone = executor.result(ticket)
    except WorkerFailed as error:
        raise final_error(fresh.unit, error, capsule="") from error
    finally:
        executor.kill(handle)
    return done
