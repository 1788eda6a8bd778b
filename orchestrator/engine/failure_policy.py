"""What can go wrong with a call, how often it may, and what follows: a table, and its one reader.

Some failures are of machines: the work goes elsewhere, and only their number says that something is
wrong with the cluster. Others are of the work: when it fails the same way on a second worker, a
third try would only cost money. Then the run stops, with a reproducer that does the work again.
"""

from dataclasses import dataclass
from enum import Enum, auto

from orchestrator.backend.executor import FailureClass, InputLost, WorkerFailed, WorkerLost
from planners.errors import CompressionError, NumericsError, StorageError

FAILURES = (CompressionError, InputLost, WorkerFailed, WorkerLost)  # what a call ends with


class Action(Enum):
    """What follows a failure."""

    RETRY = auto()  # the work is done again; the worker that failed it stays
    REPLACE = auto()  # the worker is given up, and the work is done by another
    STOP = auto()  # the run ends with an error


class Place(Enum):
    """Where a call was made, as far as it decides what another try can be."""

    STAGE = auto()  # of a pass: after half a step nobody knows what the worker's sums are
    ANY_WORKER = auto()  # a unit, and there are other workers for it
    NOWHERE_ELSE = auto()  # a unit of a single worker, a fresh process, generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done about a class of failures.

    Attributes:
        tries: how often one piece of work may meet it; the last of them stops the run.
        budget: how often a run may meet it, in any work; one more and it is not being unlucky.
        replaces: the worker is given up too; its process is gone, or not to be trusted.
        hint: what would be right, once the run has stopped.
        deterministic: it fails the same way again unless another worker tries.
        infrastructure: it is of the machines: in a pass, where one piece of work is long, only the
            budget counts.
    """

    tries: int
    budget: int
    replaces: bool
    hint: str
    deterministic: bool = False
    infrastructure: bool = False


RESUME_HINT = "what is done is kept; run the same command again"
RESUME_WHEN_HEALTHY = f"{RESUME_HINT} when the cluster is well"
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
        # A smaller cut forms other products: the sums would be other bits in the middle of a run.
        hint="what is done is kept; give workers more memory, or begin a new run with fewer "
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
    ours = isinstance(error, CompressionError)
    return FailureClass.USER_ERROR if ours else FailureClass.DEFECT


def decide(failure: FailureClass, place: Place, *, times: int) -> Action:
    """Return what follows when a piece of work meets a class of failures for the n-th time."""
    policy = POLICIES[failure]
    if policy.deterministic and place is Place.NOWHERE_ELSE:
        return Action.STOP
    if times >= policy.tries and not (policy.infrastructure and place is Place.STAGE):
        return Action.STOP
    if failure is FailureClass.LOST_INPUT:
        return Action.RETRY  # the call never began: whatever its worker holds is as it was
    return Action.REPLACE if policy.replaces or place is Place.STAGE else Action.RETRY


TROUBLE = tuple(POLICIES)
RECOVERY_TEXT: dict[str, str] = {  # what is done about it, after the words that say what happened
    **dict.fromkeys(POLICIES, "It is tried again."),
    **{name: "Its work goes on elsewhere." for name, p in POLICIES.items() if p.replaces},
    "notice": "Its work moves.",
    "waiting": "The run goes on when it has a place.",
    "placed": "",
    "silent": "Its stack is in the journal of the run.",
    "stopping": "Ctrl-C again leaves at once.",
}
