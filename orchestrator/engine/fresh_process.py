"""A process for the checks and timings of a result, and another one where that process fails."""

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


class EvaluatorProcess:
    """An evaluator in a process of its own, which is started when it is first needed, or before.

    It takes several requests, one after the other; after a failed one another process takes over.
    It sees a result only through the result's directory.
    """

    def __init__(self, executor: Executor, *, threads: int, device: str, shares: bool) -> None:
        """Start nothing yet.

        Args:
            executor: runs the process.
            threads: of the process.
            device: class of device.
            shares: reserve nothing: the cluster is this machine and this command's own, so that
                the process can wait beside the workers and use what they leave.
        """
        self._executor, self._threads, self._device = executor, threads, device
        self._resources = (
            Resources(num_cpus=0.0, any_gpu=device == "cuda")
            if shares
            else Resources.of_worker(threads, device)
        )
        self._handle: Any = None
        self._place: Any = None

    def start(self) -> None:
        """Start the process, unless there is one; it imports its libraries while it waits."""
        if self._handle is None:
            self._handle = self._executor.spawn(
                Evaluator,
                self._threads,
                self._device,
                resources=self._resources,
                name=f"evaluator-{uuid4().hex[:12]}",
            )
            self._place = self._executor.locate(self._handle)

    def answer(
        self, unit: str, method: str, request: object, *, supervisor: Supervisor
    ) -> UnitDone:
        """Return the evaluator's answer; the supervisor decides whether another process may try.

        Raises:
            ClusterError: too many processes were lost, or no machine had room for one.
            CompressionError: what the evaluator itself raised.
        """
        call = Call(name=unit, place=Place.NOWHERE_ELSE)
        while True:
            self.start()
            answered = False
            try:
                ticket = self._answered(unit, method, request)
                done: UnitDone = self._executor.result(ticket)
                answered = True
            except FAILURES as error:
                supervisor.handle(call, error)  # raises unless another process may try
                continue
            finally:
                if not answered:
                    self.close()
            supervisor.finish(unit)
            return done

    def close(self) -> None:
        """End the process, if there is one."""
        if self._handle is not None:
            self._executor.kill(self._handle)
        self._handle = self._place = None

    def _answered(self, unit: str, method: str, request: object) -> Any:
        """Return the ticket of a call that has answered.

        Raises:
            ClusterError: no machine had room for its process for too long.
        """
        since = time.monotonic()
        ticket = self._executor.call(self._handle, method, unit, request, label=unit)
        while not self._executor.ready([self._place], seconds=1.0):
            if time.monotonic() - since > PLACE_SECONDS:
                raise ClusterError(
                    f"{unit}: no machine had room for its process within {PLACE_SECONDS:.0f} s; "
                    f"{self._executor.capacity()}",
                    hint=RESUME_HINT,
                )
        while not self._executor.ready([ticket], seconds=1.0):
            pass
        return ticket


def in_fresh_process(
    executor: Executor,
    fresh: FreshProcess,
    method: str,
    request: object,
    *,
    supervisor: Supervisor | None = None,
) -> UnitDone:
    """Return an evaluator's answer to one request, from a process that ends with it.

    Outside of a run the call has a supervisor of its own.

    Raises:
        ClusterError: too many processes were lost, or no machine had room for one.
        CompressionError: what the evaluator itself raised.
    """
    process = EvaluatorProcess(executor, threads=fresh.threads, device=fresh.device, shares=False)
    try:
        return process.answer(
            fresh.unit, method, request, supervisor=supervisor or Supervisor(_ignore)
        )
    finally:
        process.close()
