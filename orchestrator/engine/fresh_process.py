"""Run a call in a process of its own, and retry it in another where that may help."""

import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from actors.messages import UnitDone
from actors.worker.evaluator import Evaluator
from orchestrator.backend.executor import Executor, Resources
from orchestrator.engine.failure_policy import FAILURES, RESUME_HINT, Place
from orchestrator.engine.supervisor import Call, Supervisor
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
    supervisor: Supervisor | None = None,
) -> UnitDone:
    """Return an evaluator's answer to a request, from a process of its own.

    The supervisor decides whether a failed process is followed by another; outside of a run the
    call has a supervisor of its own.

    Raises:
        ClusterError: too many processes were lost, or no machine had room for one.
        CompressionError: what the evaluator itself raised.
    """
    supervisor = supervisor or Supervisor(_ignore)
    call = Call(name=fresh.unit, place=Place.NOWHERE_ELSE)
    while True:
        handle = _spawned(executor, fresh)
        try:
            ticket = _answered(executor, handle, fresh, method, request)
            try:
                done: UnitDone = executor.result(ticket)
            except FAILURES as error:
                supervisor.handle(call, error)  # raises unless another process may try
                continue
        finally:
            executor.kill(handle)
        supervisor.finish(fresh.unit)
        return done


def _spawned(executor: Executor, fresh: FreshProcess) -> Any:
    gpus = 1.0 if fresh.device == "cuda" else 0.0
    return executor.spawn(
        Evaluator,
        fresh.threads,
        fresh.device,
        resources=Resources(num_cpus=fresh.threads, num_gpus=gpus),
        name=f"evaluator-{fresh.unit}-{uuid4().hex[:8]}",
    )


def _answered(
    executor: Executor, handle: Any, fresh: FreshProcess, method: str, request: object
) -> Any:
    """Return the ticket of a call that has answered.

    Raises:
        ClusterError: no machine had room for its process for too long.
    """
    place, since = executor.locate(handle), time.monotonic()
    ticket = executor.call(handle, method, fresh.unit, request, label=fresh.unit)
    while not executor.ready([place], seconds=1.0):
        if time.monotonic() - since > PLACE_SECONDS:
            raise ClusterError(
                f"{fresh.unit}: no machine had room for its process within {PLACE_SECONDS:.0f} s; "
                f"{executor.capacity()}",
                hint=RESUME_HINT,
            )
    while not executor.ready([ticket], seconds=1.0):
        pass
    return ticket
