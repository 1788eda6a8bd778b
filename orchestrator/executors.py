"""Where the work runs: on a Ray cluster, or in this process.

Actors are plain classes; they become Ray actors here and nowhere else, so that a test can build and
call them like any object. One thread waits for answers and fetches only small ones that are ready:
a thread blocked on a large or lost object stalls Ray's own failure handling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from planners.errors import CompressionError


class WorkerLost(Exception):
    """The process that held an actor is gone, or its call never answered.

    Attributes:
        reason: preempted, worker lost, or out of memory.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class InputLost(Exception):
    """An argument of a call was on a node that is gone; the actor itself is healthy."""


class WorkerFailed(Exception):
    """The work raised an error of ours that no policy handles: a defect, with its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one actor reserves."""

    num_cpus: float
    num_gpus: float = 0.0


class Executor(Protocol):
    """Spawns actors, starts calls on them, and says which have answered."""

    def spawn(self, actor_class: type, *args: Any, resources: Resources, name: str) -> Any:
        """Return a handle on a new actor; its construction may still be under way."""
        ...

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Start a call; return its ticket, or one for each of several returns.

        A ticket may be an argument of a later call. Calls on one actor run in the order made.
        """
        ...

    def ready(self, tickets: Sequence[Any], *, seconds: float) -> list[Any]:
        """Return the tickets that have answered, waiting at most so long for the first."""
        ...

    def result(self, ticket: Any) -> Any:
        """Return the answer of a ready ticket.

        Raises:
            WorkerLost: its process is gone.
            InputLost: an argument is gone.
            CompressionError: what the call itself raised.
        """
        ...

    def kill(self, handle: Any) -> None:
        """End an actor's process; one that is gone already is no error."""
        ...


class LocalExecutor:
    """Runs every call at once in this process: for tests and debugging."""

    def spawn(self, actor_class: type, *args: Any, resources: Resources, name: str) -> Any:
        """Return the object itself; ``resources`` do not matter here."""
        del resources, name
        return actor_class(*args)

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Return finished tickets."""
        del label
        values = [arg.value if isinstance(arg, _Answer) else arg for arg in args]
        answer = getattr(handle, method)(*values)
        if num_returns == 1:
            return _Answer(answer)
        return tuple(_Answer(part) for part in answer)

    def ready(self, tickets: Sequence[Any], *, seconds: float) -> list[Any]:
        """Return all tickets: every call has answered."""
        del seconds
        return list(tickets)

    def result(self, ticket: Any) -> Any:
        """Return the answer."""
        return ticket.value

    def kill(self, handle: Any) -> None:
        """Forget the object."""


class _Answer:
    """A ticket of the local executor; compared and hashed by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value


class RayExecutor:
    """Runs every call on the Ray cluster this process is connected to."""

    def __init__(self, *, environment: Mapping[str, str] | None = None) -> None:
        """Use the current connection; workers see ``environment`` on top of their own."""
        self._environment = dict(environment or {})

    def spawn(self, actor_class: type, *args: Any, resources: Resources, name: str) -> Any:
        """Return the handle of a new actor that Ray will not restart by itself."""
        environment = dict(self._environment)
        if not resources.num_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # unset, a CPU actor would see every GPU
        remote = ray.remote(actor_class).options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            name=name,
            runtime_env={"env_vars": environment},
        )
        return remote.remote(*args)

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Return object refs; nothing is fetched."""
        bound = getattr(handle, method).options(num_returns=num_returns, name=label)
        return bound.remote(*args)

    def ready(self, tickets: Sequence[Any], *, seconds: float) -> list[Any]:
        """Wait for the first answer, and take those that came with it."""
        done, _ = ray.wait(list(tickets), num_returns=1, timeout=seconds, fetch_local=False)
        if done and len(tickets) > 1:
            done, _ = ray.wait(
                list(tickets), num_returns=len(tickets), timeout=0, fetch_local=False
            )
        return list(done)

    def result(self, ticket: Any) -> Any:
        """Fetch a small answer; tell a lost argument from a lost worker."""
        try:
            return ray.get(ticket)
        except RayTaskError as error:
            # Before RayActorError: a lost argument arrives as an error of the healthy actor.
            if isinstance(error, ObjectLostError) or isinstance(error.cause, ObjectLostError):
                raise InputLost(str(error).splitlines()[0]) from error
            if isinstance(error.cause, CompressionError):
                raise error.cause from None
            raise WorkerFailed(str(error)) from error
        except OutOfMemoryError as error:
            raise WorkerLost("out of memory", _first_line(error)) from error
        except (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError) as error:
            preempted = getattr(error, "preempted", False)
            reason = "preempted" if preempted else "worker lost"
            raise WorkerLost(reason, _first_line(error)) from error

    def kill(self, handle: Any) -> None:
        """End the actor's process; Ray says nothing where it is gone already."""
        ray.kill(handle, no_restart=True)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
