"""The failure policy: how often each class of failures may occur, and what is done about it.

Some failures come from machines: the work is retried elsewhere, and only their number shows that
something is wrong with the cluster. Others come from the work: when it fails the same way on a
second worker, a third attempt would only cost money. Then the run stops, with a reproducer that
repeats the work.
"""

from dataclasses import dataclass
from enum import Enum, auto

from orchestrator.backend.executor import FailureClass, InputLost, WorkerFailed, WorkerLost
from planners.errors import CompressionError, NumericsError, StorageError

FAILURES = (CompressionError, InputLost, WorkerFailed, WorkerLost)  # what a call may raise


class Action(Enum):
    """What follows a failure."""

    RETRY = auto()  # retry the work; keep the worker that failed it
    REPLACE = auto()  # replace the worker, and retry the work on another
    STOP = auto()  # end the run with an error


class Place(Enum):
    """Where a call was made, as far as it decides how it can be retried."""

    STAGE = auto()  # a stage of a pass: after a partial step the worker's sums are unknown
    ANY_WORKER = auto()  # a unit that other workers can do
    NOWHERE_ELSE = auto()  # a unit of a single worker, a fresh process, generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done about a class of failures.

    Attributes:
        tries: how often one piece of work may fail so; the last time stops the run.
        budget: how often a run may fail so, over all work; one more stops it.
        replaces: the worker is replaced too: its process has ended or cannot be trusted.
        hint: what the user should do once the run has stopped.
        deterministic: it fails the same way again unless another worker tries.
        infrastructure: it comes from the machines: in a pass, where one piece of work is long, only
            the budget counts.
    """

    tries: int
    budget: int
    replaces: bool
    hint: str
    deterministic: bool = False
    infrastructure: bool = False


RESUME_HINT = "finished work is kept; run the same command again to resume"
RESUME_WHEN_HEALTHY = f"{RESUME_HINT} once the cluster is healthy"
POLICIES = {
    FailureClass.PREEMPTED: Policy(
        tries=8, budget=500, replaces=True, hint=RESUME_HINT, infrastructure=True
    ),
    FailureClass.NODE_LOST: Policy(
        tries=4, budget=100, replaces=True, hint=RESUME_WHEN_HEALTHY, infrastructure=True
    ),
    FailureClass.WORKER_CRASHED: Policy(tries=2, budget=20, replaces=True, hint=RESUME_HINT),
    FailureClass.STALLED: Policy(tries=2, budget=20, replaces=True, hint=RESUME_HINT),
    FailureClass.OUT_OF_MEMORY: Policy(
        tries=2,
        budget=20,
        replaces=True,
        # Smaller microbatches change the order of summation, and so the bits of the statistics.
        hint="finished work is kept; give workers more memory, or start a new run with fewer "
        "--microbatch-tokens",
    ),
    FailureClass.LOST_INPUT: Policy(
        tries=50, budget=1000, replaces=False, hint=RESUME_WHEN_HEALTHY, infrastructure=True
    ),
    FailureClass.STORAGE_ERROR: Policy(tries=2, budget=20, replaces=False, hint=RESUME_HINT),
    FailureClass.NUMERIC_FAILURE: Policy(
        tries=2, budget=20, replaces=False, hint="", deterministic=True
    ),
    FailureClass.DEFECT: Policy(
        tries=2, budget=20, replaces=False, hint="this is a bug", deterministic=True
    ),
    FailureClass.USER_ERROR: Policy(tries=1, budget=1, replaces=False, hint=""),
}


def class_of(error: Exception) -> FailureClass:
    """Return the class of what a call raised."""
    if isinstance(error, WorkerLost):
        return error.reason
    if isinstance(error, InputLost):
        return FailureClass.LOST_INPUT
    if isinstance(error, StorageError):
        return FailureClass.STORAGE_ERROR
    if isinstance(error, NumericsError):
        return FailureClass.NUMERIC_FAILURE
    is_known = isinstance(error, CompressionError)
    return FailureClass.USER_ERROR if is_known else FailureClass.DEFECT


def decide(failure: FailureClass, place: Place, *, times: int) -> Action:
    """Return what follows when a piece of work fails with a class for the ``times``-th time."""
    policy = POLICIES[failure]
    if policy.deterministic and place is Place.NOWHERE_ELSE:
        return Action.STOP
    if times >= policy.tries and not (policy.infrastructure and place is Place.STAGE):
        return Action.STOP
    if failure is FailureClass.LOST_INPUT:
        return Action.RETRY  # the call never started: its worker's state is unchanged
    return Action.REPLACE if policy.replaces or place is Place.STAGE else Action.RETRY


TROUBLE = tuple(POLICIES)
RECOVERY_TEXT: dict[str, str] = {  # what is done about it, printed after what happened
    **dict.fromkeys(POLICIES, "Retrying."),
    **{name: "Retrying on another worker." for name, p in POLICIES.items() if p.replaces},
    "notice": "Its work moves to another node.",
    "waiting": "The run continues once there is room for it.",
    "placed": "",
    "silent": "Its stack trace is in the events of the run.",
    "stopping": "Press Ctrl-C again to quit at once.",
}
