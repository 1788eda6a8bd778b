"""Complete a training from its newest checkpoint, and write more of them on the way."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from actors.training.checkpoints import Checkpoints, Manifest
from actors.training.course import Course, follow
from actors.training.lessons import Lessons, Trained
from actors.training.steps import Steps
from planners.errors import NumericsError
from planners.recovery import Recovery

SAVE_SECONDS = 60.0  # between two checkpoints, where steps are slow
SAVE_SHARE = 0.05  # of the time, at most, is spent on those


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """Where and when a training is saved.

    Attributes:
        checkpoints: of its unit.
        save_every: steps between two of them, fewer where they are slow; 0 writes none but where
            it is to stop.
        stops: asked after each step, if it is to save a checkpoint and end.
    """

    checkpoints: Checkpoints
    save_every: int
    stops: Callable[[], bool] = _never


class _Clock:
    """When to save: each so many steps, and of slow steps once a minute, if that costs little."""

    def __init__(self, save_every: int) -> None:
        self._every, self._pause = save_every, SAVE_SECONDS
        self._saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether to save after a step."""
        if not self._every:
            return False
        return step % self._every == 0 or time.monotonic() - self._saved > self._pause

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Time what saves."""
        begun = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._saved - begun) / SAVE_SHARE)


def found_for(checkpoints: Checkpoints, agreed: Callable[[float], float]) -> Manifest | None:
    """Return the checkpoint to resume from: for all workers the one that the first one found.

    Raises:
        NumericsError: the training failed before.
    """
    found = checkpoints.newest() if checkpoints.writes else None
    step = int(agreed(found.course.step if found else -1))
    if step >= 0 and found is None:
        found = checkpoints.at(step)
    if found and found.failure:
        raise NumericsError(found.failure, hint=found.hint)
    return found


def complete(
    found: Manifest | None,
    lessons: Lessons,
    trained: Trained,
    recovery: Recovery,
    durability: Durability,
) -> tuple[Course, dict[str, Tensor]]:
    """Train to the end, or until it is to stop.

    Returns:
        How it went; name -> value of the tensors that were trained, empty where it was stopped.

    Raises:
        NumericsError: the loss is no number, or far above that at the start.
    """
    checkpoints, clock = durability.checkpoints, _Clock(durability.save_every)
    steps = Steps(trained.parameters, trained.units, recovery, divided=trained.divided)
    course = Course()
    if found:
        course = found.course
        steps.restore(checkpoints.tensors(found))

    def pauses() -> bool:
        stops = durability.stops()
        if stops or clock.is_due(course.step):
            with clock.saving():
                checkpoints.save(course, steps.tensors())
        return stops

    try:
        finished = follow(course, steps, lessons, recovery, pauses=pauses)
    except NumericsError as error:
        checkpoints.fail(course, str(error), hint=error.hint)
        raise
    return course, trained.results() if finished else {}
