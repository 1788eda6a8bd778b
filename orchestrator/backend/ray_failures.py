"""What an error of Ray means: which class of failure it is."""

from typing import Any

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from orchestrator.backend import ray_cluster
from orchestrator.backend.executor import FailureClass, InputLost, WorkerFailed, WorkerLost
from planners.errors import CompressionError

SYSTEM_ERRORS = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    NodeDiedError,
    OutOfMemoryError,
)


class GroupFailure(Exception):  # noqa: N818 it may be no error: a group that leaves
    """Why a worker of a group ended, other than by an error that a user can act on.

    Attributes:
        kind: `PREEMPTED` for a group that saved a checkpoint and leaves, `WORKER_CRASHED` for one
            that lost another worker, `OUT_OF_MEMORY`, or `DEFECT`.
        text: what happened; of a defect the traceback.
    """

    def __init__(self, kind: FailureClass, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def of_a_call(error: RayTaskError) -> Exception:
    """Return what a call raised as one of the errors of `Executor.result`."""
    cause: Any = error
    while isinstance(cause, RayTaskError) and cause.cause is not None and cause.cause is not cause:
        cause = cause.cause
    # The actor that answers is healthy: an argument was lost, or the actor that made it.
    if isinstance(error, SYSTEM_ERRORS) or isinstance(cause, SYSTEM_ERRORS):
        return InputLost(first_line(error))
    if isinstance(cause, CompressionError):
        cause.add_note(str(error))  # with the traceback in the worker
        return cause
    if out_of_memory(cause):
        return WorkerLost(FailureClass.OUT_OF_MEMORY, first_line(cause))
    return WorkerFailed(str(error))


def out_of_memory(cause: Exception) -> bool:
    """Return whether a host or device was out of memory, without importing torch."""
    named = isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(cause)


def reason_of(error: Exception) -> FailureClass:
    """Return the class of a loss: of the node, or of the process only."""
    if isinstance(error, OutOfMemoryError):
        return FailureClass.OUT_OF_MEMORY
    if getattr(error, "preempted", False):
        return FailureClass.PREEMPTED
    if isinstance(error, NodeDiedError) or "node has died" in str(error):
        return FailureClass.NODE_LOST
    if isinstance(error, ActorUnavailableError) and not ray_cluster.node_reachable(error.actor_id):
        return FailureClass.NODE_LOST  # before Ray itself notices
    return FailureClass.WORKER_CRASHED


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
