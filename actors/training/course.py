"""How a training goes: trials of rates, then the training, its measurements and its end.

The same for whole models and for single layers; what differs is in their `Lessons`. Several rates
are tried from the first, the highest: each trains for a quarter of the steps by a schedule of that
length, until one ends with a higher held-out loss than the one before. The best then trains from
the start.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.training.lessons import Lessons
from actors.training.steps import Steps
from planners.errors import NumericsError
from planners.recovery import RISING, RISING_STEPS, Recovery

Entry = dict[str, float | None]  # a loss that is no number is None, which JSON has


@dataclass(slots=True, kw_only=True)
class Course:
    """What is known of a training so far, in numbers.

    Attributes:
        step: how many were taken, those of trials too.
        history: of each step its number, rate, loss before it, and tokens.
        held_out: losses on the held-out sequences, and after how many steps.
        trials: the rates that were tried, and the held-out loss after each.
        chosen: the rate of the training; None before it is known.
        best: the lowest held-out loss of the training and after how many of its steps; those before
            it, 0, included.
        rising: for how many steps in a row the loss has been far above that at the start.
    """

    step: int = 0
    history: list[Entry] = field(default_factory=list)
    held_out: list[Entry] = field(default_factory=list)
    trials: list[Entry] = field(default_factory=list)
    chosen: float | None = None
    best: Entry = field(default_factory=dict)
    rising: int = 0


def follow(
    course: Course,
    steps: Steps,
    lessons: Lessons,
    recovery: Recovery,
    *,
    pauses: Callable[[], bool],
) -> bool:
    """Train from where a course stands to its end, and leave the best weights.

    Args:
        course: is brought up to date.
        steps: of what is trained.
        lessons: what is learnt.
        recovery: how.
        pauses: called after each step but the last; saves what is due, and returns whether to stop.

    Returns:
        Whether the end was reached.

    Raises:
        NumericsError: the loss is no number, or far above that at the start.
    """
    if not course.held_out:
        _begin(course, lessons, recovery)
    while course.step < recovery.all_steps:
        _advance(course, steps, lessons, recovery)
        if course.step < recovery.all_steps and pauses():
            return False
    steps.return_to_best()
    return True


def _begin(course: Course, lessons: Lessons, recovery: Recovery) -> None:
    start = lessons.held_out_loss()
    if not math.isfinite(start):
        raise NumericsError(f"recovery: the held-out loss is {start} before the first step")
    course.held_out.append({"step": 0, "loss": start})
    course.best = {"step": 0, "loss": start}
    if len(recovery.rates) == 1:
        course.chosen = recovery.rates[0]


def _advance(course: Course, steps: Steps, lessons: Lessons, recovery: Recovery) -> None:
    """Take one step, and do what is due behind it."""
    place = recovery.place(course.step)
    tried = recovery.rates[place.trial] if course.chosen is None else course.chosen
    rate = tried * recovery.factor(place.step, place.steps)
    gradients, loss = lessons.gradient(place)
    tokens = recovery.batch * lessons.terms
    course.history.append(
        {"step": course.step, "rate": rate, "loss": _number(loss), "tokens": tokens}
    )
    course.step += 1
    failure = _failure(course, loss)
    if not failure:
        steps.step(gradients, rate)
    elif place.trial < 0 and recovery.mode == "local" and math.isfinite(loss):
        course.step = recovery.all_steps  # a layer of which little was lost keeps what it has
        return
    elif place.trial < 0:
        raise NumericsError(
            f"recovery: {failure} at step {place.step + 1} of {place.steps}, rate {tried:g}",
            hint=f"use a smaller rate, such as {tried / 10:g}",
        )
    else:
        course.step += place.steps - place.step - 1  # the rest of the trial is left out
    if place.trial >= 0:
        if failure or place.step + 1 == place.steps:
            held_out = math.nan if failure else lessons.held_out_loss()
            _end_trial(course, steps, recovery, rate=tried, loss=held_out)
    elif recovery.is_measured(place.step + 1):
        held_out = lessons.held_out_loss()
        course.held_out.append({"step": course.step, "loss": _number(held_out)})
        if held_out < _loss(course.best):
            course.best = {"step": place.step + 1, "loss": held_out}
            steps.keep()


def _end_trial(
    course: Course, steps: Steps, recovery: Recovery, *, rate: float, loss: float
) -> None:
    """Note how a trial went, and take the weights from before it."""
    course.trials.append({"rate": rate, "loss": _number(loss)})
    course.rising = 0
    steps.return_to_best()  # no weights have been kept yet but those at the start
    left = len(recovery.rates) - len(course.trials)
    losses = [_loss(trial) for trial in course.trials]
    past_best = len(losses) > 1 and losses[-1] > losses[-2]
    if left and not past_best:
        return
    course.step += left * recovery.trial_steps  # lower rates are left out
    best = min(course.trials, key=_loss)
    if best["loss"] is None:
        raise NumericsError(
            "recovery: the loss is no number, or rises, at every rate that was tried",
            hint=f"use smaller rates, such as {min(recovery.rates) / 10:g}",
        )
    course.chosen = best["rate"]


def _failure(course: Course, loss: float) -> str:
    """Return what is wrong with the loss of a step; empty if nothing."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    limit = RISING * _loss(course.held_out[0])
    course.rising = course.rising + 1 if loss > limit else 0
    if course.rising < RISING_STEPS:
        return ""
    return f"the loss has been above {RISING:g} times that at the start for {RISING_STEPS} steps"


def _number(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _loss(entry: Entry) -> float:
    loss = entry["loss"]
    return math.inf if loss is None else loss


def recorded(course: Course) -> dict[str, object]:
    """Return the numbers of a training, as records and reports have them."""
    return {
        "history": course.history,
        "held_out": course.held_out,
        "trials": course.trials,
        "rate": course.chosen,
        "best": course.best,
    }
