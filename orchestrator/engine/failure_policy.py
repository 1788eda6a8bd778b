"""What goes wrong while work is done: a table of classes, what is done about each, and how often.

Some failures are of machines: the work goes elsewhere, and only their number says that something is
wrong with the cluster. Others are of the work: when it fails the same way on a second worker, a
third try would only cost money. Then the run stops, with a capsule that does the work again.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from orchestrator.backend.executor import InputLost, WorkerFailed, WorkerLost
from planners.errors import ClusterError, CompressionError, NumericsError, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is done about a class of failures.

    Attributes:
        tries: how often one piece of work may meet it; the last of them stops the run.
        budget: how often a run may meet it, in any work; one more and it is not being unlucky.
        replaces: the worker is given up too; its process is gone, or not to be trusted.
        hint: what would be right, once the run has stopped.
        deterministic: the same process would fail the same way: only another is worth a try.
        infrastructure: it is of the machines: in a pass, where much is lost with each, only the budget
            counts.
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
    "preempted": Policy(tries=8, budget=500, replaces=True, hint=RESUME_HINT, infrastructure=True),
    "node lost": Policy(
        tries=4, budget=100, replaces=True, hint=RESUME_WHEN_HEALTHY, infrastructure=True
    ),
    "worker crashed": Policy(tries=2, budget=20, replaces=True, hint=RESUME_HINT),
    "stalled": Policy(tries=2, budget=20, replaces=True, hint=RESUME_HINT),
    "out of memory": Policy(
        tries=2,
        budget=20,
        replaces=True,
        # A smaller cut forms other products: the sums would be other bits in the middle of a run.
        hint="what is done is kept; give workers more memory, or begin a new run with fewer "
        "--microbatch-tokens",
    ),
    "lost input": Policy(
        tries=50, budget=1000, replaces=False, hint=RESUME_WHEN_HEALTHY, infrastructure=True
    ),
    "storage error": Policy(tries=2, budget=20, replaces=False, hint=RESUME_HINT),
    "numeric failure": Policy(tries=2, budget=20, replaces=False, hint="", deterministic=True),
    "defect": Policy(tries=2, budget=20, replaces=False, hint="this is a bug", deterministic=True),
    "user error": Policy(tries=1, budget=1, replaces=False, hint=""),
}


def class_of(error: Exception) -> str:
    """Return the class of what a call raised: a key of `POLICIES`."""
    if isinstance(error, WorkerLost):
        return error.reason
    if isinstance(error, InputLost):
        return "lost input"
    if isinstance(error, StorageError):
        return "storage error"
    if isinstance(error, NumericsError):
        return "numeric failure"
    return "user error" if isinstance(error, CompressionError) else "defect"


class Failures:
    """How often each piece of work met each class of failure, and whether it may be tried again.

    Attributes:
        counts: class -> how often the run met it.
    """

    def __init__(self) -> None:
        self._met: dict[str, Counter[str]] = defaultdict(Counter)
        self.counts: Counter[str] = Counter()

    def met(self, work: str) -> list[str]:
        """Return the classes that a piece of work has met, in the order of the table."""
        return [name for name in POLICIES if self._met[work][name]]

    def count(self, error: Exception) -> None:
        """Count a failure of the run.

        Raises:
            ClusterError: there were more of its class than can be bad luck.
        """
        name = class_of(error)
        self.counts[name] += 1
        if self.counts[name] > POLICIES[name].budget:
            what = "inputs" if name == "lost input" else "workers"
            raise ClusterError(
                f"{self.counts[name]} {what} were lost in this run, the last one with: {error}",
                hint=POLICIES[name].hint or RESUME_HINT,
            )

    def exhausted(self, work: str, error: Exception) -> bool:
        """Count a failure of a piece of work; return whether that was its last try."""
        name = class_of(error)
        self._met[work][name] += 1
        return self._met[work][name] >= POLICIES[name].tries


def final_error(work: str, error: Exception, *, capsule: str) -> CompressionError:
    """Return the error that ends the run; ``capsule`` is the command that does the work again."""
    name = class_of(error)
    policy = POLICIES[name]
    hints = [*([capsule] if capsule else []), policy.hint]
    if isinstance(error, CompressionError):
        hint = "; ".join(part for part in [error.hint, *hints] if part)
        return type(error)(str(error), hint=hint)
    hint = "; ".join(part for part in hints if part)
    if isinstance(error, WorkerFailed):
        return CompressionError(f"{work} failed: {error.summary}", hint=hint)
    times = f"{policy.tries} times" if policy.tries > 1 else "once"
    return ClusterError(f"{work} lost its worker {times}, the last one with: {error}", hint=hint)


TROUBLE = tuple(POLICIES)
RECOVERY_TEXT = {  # what is done about it, after the words that say what happened
    **dict.fromkeys(POLICIES, "It is tried again."),
    **{name: "Its work goes on elsewhere." for name, p in POLICIES.items() if p.replaces},
    "notice": "Its work moves.",
    "waiting": "The run goes on when it has a place.",
    "placed": "",
    "silent": "Its stack is in the journal of the run.",
    "stopping": "Ctrl-C again leaves at once.",
}
