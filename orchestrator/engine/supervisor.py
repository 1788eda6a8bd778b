"""Decide what follows a failure: count it, write it to the journal, end the run if it must end."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.backend.executor import FailureClass, WorkerFailed, WorkerLost
from orchestrator.engine.failure_policy import (
    POLICIES,
    RESUME_HINT,
    Action,
    Place,
    class_of,
    decide,
)
from orchestrator.engine.reproduce import Reproducer, write_reproducer
from planners.errors import ClusterError, CompressionError, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that failed.

    Attributes:
        name: of the work; its attempts are counted by it, and the reproducer's file is named so.
        place: how it can be retried.
        worker: that ran it; empty for a process that has no slot.
        reproducer: repeats it; None if that takes more than one process.
    """

    name: str
    place: Place
    worker: str = ""
    reproducer: Reproducer | None = None


class Supervisor:
    """Counts the failures of a run, and decides what follows the next one."""

    def __init__(self, emit: Callable[..., None]) -> None:
        """Start with no failures; ``emit`` is called for each, as `Journal.emit` is."""
        self._emit = emit
        self._met: dict[str, Counter[FailureClass]] = defaultdict(Counter)
        self._counts: Counter[FailureClass] = Counter()

    def handle(self, call: Call, error: Exception) -> Action:
        """Return whether to retry the work of a call, or to replace its worker first.

        Raises:
            CompressionError: the run stops: the work failed too often, or its class of failures
                occurred too often in this run.
        """
        failure = class_of(error)
        self._met[call.name][failure] += 1
        action = decide(failure, call.place, times=self._met[call.name][failure])
        if action is Action.STOP:
            raise self._stop(call, error) from error
        self.count(error, unit=call.name, worker=call.worker)
        return action

    def count(self, error: Exception, *, unit: str = "", worker: str = "") -> None:
        """Emit a failure and count it.

        Raises:
            ClusterError: there were more failures of its class than its budget allows.
        """
        failure = class_of(error)
        self._emit(failure, unit=unit, worker=worker, detail=str(error))
        self._counts[failure] += 1
        if self._counts[failure] > POLICIES[failure].budget:
            what = "inputs" if failure is FailureClass.LOST_INPUT else "workers"
            raise ClusterError(
                f"{self._counts[failure]} {what} were lost in this run, most recently: {error}",
                hint=POLICIES[failure].hint or RESUME_HINT,
            )

    def finish(self, name: str) -> list[str]:
        """Return the classes of failures that finished work met, and reset its attempts."""
        met = self._met.pop(name, Counter())
        return [str(failure) for failure in POLICIES if met[failure]]

    def _stop(self, call: Call, error: Exception) -> CompressionError:
        """Return the error that ends the run, after its reproducer was written."""
        failure = class_of(error)
        message = str(error).removeprefix(f"{failure}: ")
        self._emit("gave up", unit=call.name, worker=call.worker, detail=f"{failure}: {message}")
        command, reproducer = "", call.reproducer
        met = self.finish(call.name)
        if reproducer is not None and failure is not FailureClass.USER_ERROR:
            with contextlib.suppress(StorageError):  # a store that fails accepts no file either
                command = write_reproducer(call.name, reproducer, error, failure=failure, met=met)
        return _final_error(call.name, error, command=command)


def _final_error(name: str, error: Exception, *, command: str) -> CompressionError:
    """Return the error shown to the user; ``command`` repeats the work, where that is possible."""
    policy = POLICIES[class_of(error)]
    own = error.hint if isinstance(error, CompressionError) else ""
    again = f"to reproduce it here: {command}" if command else ""
    hint = "; ".join(part for part in (own, again, policy.hint) if part)
    if isinstance(error, CompressionError):
        return type(error)(str(error), hint=hint)
    if isinstance(error, WorkerFailed):
        return CompressionError(f"{name} failed: {error.summary}", hint=hint)
    what = "its worker" if isinstance(error, WorkerLost) else "its input"
    times = f"{policy.tries} times" if policy.tries > 1 else "once"
    return ClusterError(f"{name} lost {what} {times}, most recently: {error}", hint=hint)
