"""The interface between a pool and what runs its workers, and the ways in which calls fail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from actors.messages import TrainRequest


class FailureClass(StrEnum):
    """The classes of failures of a call, as named in events, records and reports."""

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
    """The process of an actor has ended, or must not be used any more.

    Attributes:
        reason: why, one of the first five classes.
    """

    def __init__(self, reason: FailureClass, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class InputLost(Exception):
    """An argument of a call was on a lost node; the actor itself is healthy."""


class WorkerFailed(Exception):
    """The work raised an unexpected error: a defect, with its traceback.

    Attributes:
        summary: the last line of the traceback.
    """

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        lines = traceback.strip().splitlines()
        self.summary = lines[-1].strip() if lines else "an error without a message"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one actor reserves.

    Attributes:
        num_cpus: logical cores.
        num_gpus: devices; it sees these only.
        any_gpu: it sees all GPUs of its machine, although it reserves none.
    """

    num_cpus: float
    num_gpus: float = 0.0
    any_gpu: bool = False

    @classmethod
    def of_worker(cls, threads: int, device: str) -> "Resources":
        """Return what a worker reserves."""
        return cls(num_cpus=threads, num_gpus=float(device == "cuda"))

    def __str__(self) -> str:
        """Return the resources as text: ``2 CPU and 1 GPU``."""
        gpus = f" and {self.num_gpus:g} GPU" if self.num_gpus else ""
        return f"{self.num_cpus:g} CPU{gpus}"

    @property
    def bundle(self) -> dict[str, float]:
        """The resources as Ray's mapping of names to amounts."""
        return {"CPU": self.num_cpus, **({"GPU": self.num_gpus} if self.num_gpus else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyActor:
    """A process that was started before it was known what for.

    Attributes:
        module: with the class of its actor; imported there.
        resources: what it reserves.
        handle: of it.
    """

    module: str
    resources: Resources
    handle: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLocation:
    """Where an actor runs: its node, by Ray's hex id, its process, and its stack file.

    Attributes:
        node: empty if there are no nodes.
        pid: on that node.
        stack_file: on that node; written when the process gets `STACK_SIGNAL`.
    """

    node: str = ""
    pid: int = 0
    stack_file: str = ""


class Training(Protocol):
    """A group of workers that trains a model; the group restarts by itself after a loss."""

    def done(self) -> bool:
        """Return whether it has ended; this does not wait."""
        ...

    def result(self) -> None:
        """Wait until it has ended, and release what it held.

        It has ended well if all is trained, or if a stop was asked for in the run directory: what
        is trained stands in the run directory.

        Raises:
            WorkerLost: its workers were lost too often.
            WorkerFailed: the training raised an unexpected error.
            CompressionError: what the training itself raised, on any worker.
        """
        ...

    def cancel(self) -> None:
        """End the group at once, with all steps since its last checkpoint, and release it."""
        ...


class Executor(Protocol):
    """Spawns actors, starts calls on them, and returns their answers."""

    def spawn(self, actor_class: type, *args: Any, resources: Resources, name: str) -> Any:
        """Return a handle on a new actor; it may still be starting."""
        ...

    def locate(self, handle: Any) -> Any:
        """Return a ticket for the `ActorLocation` of an actor, which answers once it runs."""
        ...

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Start a call; return its ticket, or a tuple of one for each of several returns.

        A ticket may be an argument of a later call. Calls on one actor run in the order made.
        """
        ...

    def ready(self, tickets: Sequence[Any], *, seconds: float) -> list[Any]:
        """Return the tickets that have answered, waiting up to ``seconds`` for the first."""
        ...

    def result(self, ticket: Any) -> Any:
        """Return the answer of a ready ticket.

        Raises:
            WorkerLost: its process was lost.
            InputLost: an argument was lost.
            WorkerFailed: the call raised an unexpected error.
            CompressionError: what the call itself raised.
        """
        ...

    def train(
        self,
        request: TrainRequest,
        *,
        num_workers: tuple[int, int],
        resources: Resources,
        name: str,
    ) -> Training:
        """Start to train a model, on as many workers as there is room for.

        Args:
            request: what is trained, and where it stands.
            num_workers: at least, and at most.
            resources: of one worker.
            name: shown in Ray's dashboard.

        Raises:
            ConfigError: a package is missing.
            WorkerLost: the process that starts the workers was lost.
        """
        ...

    def kill(self, handle: Any) -> None:
        """End an actor's process; it is no error if it has ended already."""
        ...

    def kill_process(self, where: ActorLocation) -> None:
        """Kill a process that does not react to `kill`, which only requests its end."""
        ...

    def stack(self, where: ActorLocation) -> str:
        """Return the current stack trace of a process, or empty if it cannot be read."""
        ...

    def draining(self) -> Mapping[str, float]:
        """Return node -> seconds left, of the nodes that are draining."""
        ...

    def request_resources(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Request room for these bundles at once; none withdraws the request."""
        ...

    def capacity(self) -> str:
        """Return the cluster's total and free CPUs and GPUs as text."""
        ...
