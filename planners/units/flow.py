"""Which microbatch may be submitted to which stage: shared by a pass and its simulation.

Queues are bounded: a stage has at most `MAX_INFLIGHT` calls in flight, and at most `WINDOW` of its
outputs wait for the next stage. Lost outputs are recomputed, from the nearest earlier stage that
still has them.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from planners.memory.placement import MAX_INFLIGHT, WINDOW


@dataclass(slots=True)
class Flow:
    """The progress of one stage in a pass.

    Attributes:
        next: first microbatch that was not submitted to it yet.
        done: microbatches that it has summed.
        lacking: the microbatch that the next stage needs next; it may have passed here already.
        inflight: ticket -> microbatch and its future output.
        outputs: computed outputs that the next stage has not consumed yet.
        paused: nothing is submitted to it for now.
        starting: it has not reported where it resumes, so what it needs is not known.
    """

    next: int = 0
    done: int = 0
    lacking: int = 0
    inflight: dict[Any, tuple[int, Any]] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    paused: bool = False
    starting: bool = False

    @property
    def wanted(self) -> int:
        """The microbatch to submit next: one to recompute for the next stage, or a new one."""
        given = {index for index, _ in self.inflight.values()}
        passed = self.lacking < self.next and self.lacking not in self.outputs.keys() | given
        return self.lacking if passed else self.next

    def submit(self, ticket: Hashable, index: int, output: Any) -> None:
        """Count a microbatch as submitted to the stage."""
        self.inflight[ticket] = (index, output)
        self.next += int(index == self.next)

    def restart(self, done: int) -> None:
        """Forget what a lost worker held; its replacement has summed ``done`` microbatches."""
        self.inflight, self.outputs = {}, {}
        self.next = self.done = done


def submissions(
    stages: Sequence[Flow], total: int, *, answered: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (stage, microbatch) of every call that may be made now, of ``total`` microbatches.

    Call `Flow.submit` for each before requesting the next.

    Args:
        stages: of the wave, in order.
        total: microbatches of the pass.
        answered: the only stage that changed since the last call of this function: the result is
            the same as when all stages are checked, but faster.
    """
    last = len(stages) - 1
    first = last if answered is None else min(answered + 1, last)
    lacking = total if first == last else stages[first].lacking  # there is no stage after the last
    for slot in range(first, -1, -1):
        stage, submitted = stages[slot], False
        stage.lacking = lacking
        while len(stage.inflight) < MAX_INFLIGHT and _may(stages, slot, stage.wanted, total):
            submitted = True
            yield slot, stage.wanted
        lacking = total if stage.starting else stage.wanted
        settled = not submitted and (slot == 0 or stages[slot - 1].lacking == lacking)
        if answered is not None and slot < answered and settled:
            return


def accept(stages: Sequence[Flow], slot: int, ticket: Hashable) -> int:
    """Count a call as answered, and return its microbatch."""
    stage = stages[slot]
    index, output = stage.inflight.pop(ticket)
    stage.done += int(index == stage.done)  # else it was recomputed, or out of order
    last = slot == len(stages) - 1
    # Only now: a call that waits for the output of a lost worker would fail with it.
    if not last and (index >= stages[slot + 1].next or index == stage.lacking):
        stage.outputs[index] = output
    if slot > 0:  # consumed: the object store may free it
        stages[slot - 1].outputs.pop(index, None)
    return index


def _may(stages: Sequence[Flow], slot: int, index: int, total: int) -> bool:
    """Return whether the input of a stage is available and its output has room to wait."""
    if index == total or stages[slot].paused:
        return False
    if slot > 0 and index not in stages[slot - 1].outputs:
        return False
    last = slot == len(stages) - 1
    return last or index - stages[slot + 1].next < WINDOW
