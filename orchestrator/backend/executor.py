"""What a pool asks of whatever runs its workers, and how calls to them fail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class FailureClass(StrEnum):
    """What can go wrong with a call; the words are those of events, records and reports."""

    PREEMPTED = "preempted"
    NODE_LOST = "node lost"
    WORKER_CRASHED = "worker crashed"
    STALLED = "stalled"
    OUT_OF_MEMORY = "out of memory"
    LOST_INPUT = "lost input"
    STORAGE_ERROR = "storage error"
    NUMERIC_FAILURE = "numeric failure"
    DEFECT = "defect"
    USER_ERROR = "user error"


class WorkerLost(Exception):
    """The process that held an actor is gone, or not to be used any more.

    Attributes:
        reason: why, one of the first five classes.
    """

    def __init__(self, reason: FailureClass, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class InputLost(Exception):
    """An argument of a call was on a node that is gone; the actor itself is healthy."""


class WorkerFailed(Exception):
    """The work raised an error of ours that no policy handles: a defect, with its traceback.

    Attributes:
        summary: the last line of the traceback.
    """

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        lines = traceback.strip().splitlines()
        self.summary = lines[-1].strip() if lines else "an error without a message"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one actor reserves."""

    num_cpus: float
    num_gpus: float = 0.0

    def __str__(self) -> str:
        """Return it as people say it."""
        gpus = f" and {self.num_gpus:g} GPU" if self.num_gpus else ""
        return f"{self.num_cpus:g} CPU{gpus}"

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray writes it."""
        return {"CPU": self.num_cpus, **({"GPU": self.num_gpus} if self.num_gpus else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLocation:
    """Where an actor lives: its node, by Ray's hex id, its process, and where its stack is shown.

    Attributes:
        node: empty where there are no nodes.
        pid: on that node.
        stack_file: on that node; written when the process gets `STACK_SIGNAL`.
    """

    node: str = ""
    pid: int = 0
    stack_file: str = ""


class Executor(Protocol):
    """Spawns actors, starts calls on them, and says which have answered."""

    def spawn(self, actor_class: type, *args: Any, resources: Resources, name: str) -> Any:
        """Return a handle on a new actor; its construction may still be under way."""
        ...

    def locate(self, handle: Any) -> Any:
        """Return a ticket for the `ActorLocation` of an actor, once it has a place."""
        ...

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Start a call; return its ticket, or a tuple of one for each of several returns.

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
            WorkerFailed: the call raised what it should not.
            CompressionError: what the call itself raised.
        """
        ...

    def kill(self, handle: Any) -> None:
        """End an actor's process; one that is gone already is no error."""
        ...

    def kill_process(self, where: ActorLocation) -> None:
        """End a process that does not listen; `kill` asks it to end."""
        ...

    def stack(self, where: ActorLocation) -> str:
        """Return what a process is doing now, or empty where nobody can say."""
        ...

    def draining(self) -> Mapping[str, float]:
        """Return node -> seconds left, of the nodes that were told that they will go."""
        ...

    def request_resources(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Ask the cluster to have room for these at one time; none withdraws what was asked."""
        ...

    def capacity(self) -> str:
        """Return what the cluster has and what of it is free, in words."""
        ...
