"""Let a group of workers train one model; follow it by the checkpoints in the run directory.

The group takes the place of the workers that do units. What it has trained is what the manifests of
the run directory name: this process reads them, reports them, and makes the record of the last one.
It never waits for the group longer than a moment, so the lease of the run is kept.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from actors.messages import TrainRequest, UnitDone
from actors.training.checkpoints import Manifest, manifests
from actors.training.course import recorded
from orchestrator.backend.executor import Resources, Training
from orchestrator.engine.failure_policy import FAILURES, RESUME_HINT, Place
from orchestrator.engine.supervisor import Call
from orchestrator.engine.work_context import WorkContext
from orchestrator.rundir.training_state import TRAINING, detail
from planners.errors import ClusterError

POLL_SECONDS = 0.5
LOOK_SECONDS = 2.0  # between two looks into the run directory


def train_together(
    context: WorkContext, request: TrainRequest, *, workers: tuple[int, int]
) -> UnitDone:
    """Return what the record of a finished training says.

    Args:
        context: of the run.
        request: what is trained.
        workers: at least, and at most; fewer than these train where there is no room for more.

    Raises:
        CompressionError: the training's own error, or its workers were lost too often.
        KeyboardInterrupt: the user requested a stop; the group has saved a checkpoint.
    """
    context.run.delete(request.stop)  # of a driver before this one
    started, begun = time.time(), time.monotonic()
    pool = context.pool
    with pool.vacated():
        while True:
            try:
                _follow(context, request, workers=workers)
                break
            except FAILURES as error:
                call = Call(name=request.unit, place=Place.NOWHERE_ELSE)
                pool.supervisor.handle(call, error)  # raises where it is not to be tried again
    met = pool.supervisor.finish(request.unit)
    last = _newest(context, request)
    if last is None or not last.finished or last.file is None:
        raise ClusterError(f"{request.unit}: the workers ended before it was done",
                           hint=RESUME_HINT)  # fmt: skip
    values = {**recorded(last.course), **({"retried_after": met} if met else {})}
    return UnitDone(
        unit=request.unit,
        worker="group",
        incarnation=last.incarnation,
        device=request.device,
        files=(last.file,),
        values=values,
        started=started,
        seconds=time.monotonic() - begun,
    )


def _follow(context: WorkContext, request: TrainRequest, *, workers: tuple[int, int]) -> None:
    resources = Resources.of_worker(request.threads, request.device)
    training = context.pool.executor.train(
        request, num_workers=workers, resources=resources, name=request.unit
    )
    with _ended(training):
        seen, looked, stopping = _Seen(), 0.0, False
        while not training.done():
            if context.pool.interruption.requested and not stopping:
                stopping = True
                context.journal.emit("stopping", detail="saving unfinished work first")
                context.run.write(request.stop, b"")
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                _report(context, request, seen)
            time.sleep(POLL_SECONDS)
        training.result()
        _report(context, request, seen)
    if stopping:
        context.run.delete(request.stop)
        last = _newest(context, request)
        if last is None or not last.finished:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _ended(training: Training) -> Iterator[None]:
    """End a group whatever happens to its driver, such as a second Ctrl-C."""
    try:
        yield
    except BaseException:  # raised again
        training.cancel()
        raise


def _newest(context: WorkContext, request: TrainRequest) -> Manifest | None:
    found = manifests(context.run, request.unit, request.fingerprint)
    return found[0] if found else None


@dataclass(slots=True)
class _Seen:
    """The newest checkpoint that was reported: its step, and when that was."""

    step: int = 0
    at: float = field(default_factory=time.time)


def _report(context: WorkContext, request: TrainRequest, seen: _Seen) -> None:
    """Emit how far the training is, if that has changed."""
    newest = _newest(context, request)
    if newest is None or newest.course.step <= seen.step:
        return
    course, since = newest.course, seen.at
    last, total = course.history[-1], request.recovery.all_steps
    tokens = int(sum(each["tokens"] or 0 for each in course.history))
    held_out = course.held_out[-1]["loss"]
    now = time.time()
    context.journal.emit(TRAINING, unit=request.unit, worker="group", loss=last["loss"],
                         start=since, seconds=now - since, tokens=tokens,
                         detail=detail(course.step, total, loss=last["loss"], held_out=held_out),
                         )  # fmt: skip
    seen.step, seen.at = course.step, now
