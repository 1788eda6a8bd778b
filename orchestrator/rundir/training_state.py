"""How far the training of a whole model is, as the events of its checkpoints say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.rundir.journal import Event

TRAINING = "training"  # the kind of these events
# What `detail` writes; a loss may be no number.
_DETAIL = re.compile(r"step (\d+) of (\d+)(?:.*held out (\d\S*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """A training as of its last checkpoint.

    Attributes:
        step: how many were taken, those of trials of rates too.
        steps: in all.
        loss: of the last step; None if it is no number.
        held_out: loss on the held-out sequences when it was last measured; None likewise.
        losses: at all checkpoints so far, in order.
        tokens: trained on, repeats and trials counted.
        seconds_left: at the rate between its first and last checkpoint; None if it has one alone.
        tokens_per_second: likewise; 0 if it has one alone.
    """

    step: int
    steps: int
    loss: float | None
    held_out: float | None
    losses: Sequence[float]
    tokens: int
    seconds_left: float | None
    tokens_per_second: float

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps

    @property
    def text(self) -> str:
        """The losses in words: ``loss 0.31 · held out 0.3``."""
        said = ["loss is no number" if self.loss is None else f"loss {self.loss:.4g}"]
        if self.held_out is not None:
            said.append(f"held out {self.held_out:.4g}")
        return " \u00b7 ".join(said)


def detail(step: int, steps: int, *, loss: float | None, held_out: float | None) -> str:
    """Return what such an event says, in words that `training_state` reads."""
    return f"step {step} of {steps}, loss {_number(loss)}, held out {_number(held_out)}"


def _number(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.4g}"


def training_state(events: Sequence[Event]) -> TrainingState | None:
    """Return how far a training is by the events of a run; None if it has not begun.

    A training that was interrupted takes some steps again: the later event counts.
    """
    taken: list[tuple[int, Event]] = []
    for event in events:
        said = _DETAIL.match(event["detail"]) if event["kind"] == TRAINING else None
        if said is None:
            continue
        step = int(said[1])
        taken = [*(each for each in taken if each[0] < step), (step, event)]
        steps, held_out = int(said[2]), said[3]
    if not taken:
        return None
    (before, first), (step, last) = taken[0], taken[-1]
    seconds = last["at"] - first["at"]
    losses = [each.get("loss") for _, each in taken]  # files of earlier versions have none
    return TrainingState(
        step=step,
        steps=steps,
        loss=losses[-1],
        held_out=float(held_out) if held_out else None,
        losses=[loss for loss in losses if loss is not None],
        tokens=last["tokens"],
        seconds_left=seconds / (step - before) * (steps - step) if step > before else None,
        tokens_per_second=(last["tokens"] - first["tokens"]) / seconds if seconds > 0 else 0.0,
    )
