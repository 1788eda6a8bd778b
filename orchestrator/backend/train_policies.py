"""How large a group of Ray Train is, and when it starts again; run by its controller.

In place of Ray Train's own policies. Its elastic one counts all machines, those that drain or are
in use too; it ends a group that can grow without a checkpoint; and the actor that it asks outlives
the run and keeps withdrawing what others request from the autoscaler. Its failure policy tries
again what fails the same way every time.
"""

import os
import time
from collections import defaultdict
from typing import Any

import ray
from ray.train import PreemptionInfo
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from actors.storage import hub
from orchestrator.backend import ray_cluster
from orchestrator.backend.executor import FailureClass
from orchestrator.backend.placement import free_places, release
from orchestrator.backend.ray_failures import GroupFailure, reason_of
from planners.errors import ClusterError, CompressionError, StorageError

SETTLE_SECONDS = 5.0  # for which a group waits for more room than for the fewest workers
PLACE_SECONDS = 600.0  # for which it waits for those
POLL_SECONDS = 0.5
GROW_SECONDS = 600.0  # within which a group that can grow saves a checkpoint
WINDOW_SECONDS = 3600.0
# How often a group may fail so within that time; one more ends the training.
LIMITS = {
    FailureClass.NODE_LOST: 20,
    FailureClass.WORKER_CRASHED: 8,
    FailureClass.OUT_OF_MEMORY: 1,
    FailureClass.STORAGE_ERROR: 1,
    FailureClass.DEFECT: 1,  # an error that follows from a loss may come before the loss is known
    FailureClass.USER_ERROR: 0,
}


class Restarts(FailurePolicy):  # type: ignore[misc]  # Ray's classes are Any
    """Starts a group again unless it would fail again."""

    def __init__(self, failure_config: Any) -> None:
        super().__init__(failure_config)
        self._times: dict[FailureClass, list[float]] = defaultdict(list)

    def make_decision(self, training_failed_error: Exception) -> Any:
        """Return whether to retry."""
        kind = class_of(training_failed_error)
        if kind is FailureClass.PREEMPTED:
            return FailureDecision.RETRY
        now = time.monotonic()
        recent = [at for at in self._times[kind] if now - at < WINDOW_SECONDS]
        self._times[kind] = [*recent, now]
        return FailureDecision.RETRY if len(recent) < LIMITS[kind] else FailureDecision.RAISE


def class_of(error: Exception) -> FailureClass:
    """Return the class of what ended a group: that of its most telling worker."""
    if isinstance(error, WorkerGroupError):
        found = {_class_of_worker(each) for each in error.worker_failures.values()}
        order = (FailureClass.USER_ERROR, FailureClass.PREEMPTED, *LIMITS)
        return next(kind for kind in order if kind in found)
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        # Else the group did not start: for lack of room, or of a package.
        known = isinstance(cause, CompressionError)
        return FailureClass.USER_ERROR if known else FailureClass.WORKER_CRASHED
    return FailureClass.PREEMPTED


def _class_of_worker(error: Exception) -> FailureClass:
    if isinstance(error, GroupFailure):
        return error.kind
    if isinstance(error, StorageError):
        return FailureClass.STORAGE_ERROR
    if isinstance(error, CompressionError):
        return FailureClass.USER_ERROR
    if isinstance(error, WorkerHealthCheckFailedError):
        return reason_of(error.health_check_failure)
    return FailureClass.WORKER_CRASHED


class FreeRoom(ScalingPolicy):  # type: ignore[misc]  # as above
    """Starts a group with as many workers as there is room for, and lets it grow."""

    def __init__(self, scaling_config: Any, *, parts: int) -> None:
        """Choose sizes that divide the parts of a batch."""
        super().__init__(scaling_config)
        fewest, most = scaling_config.min_workers, scaling_config.max_workers
        self._sizes = [size for size in range(fewest, most + 1) if parts % size == 0]
        self._since = self._looked = 0.0
        self._told: float | None = None  # start of the group that was told to make room

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Return the size of a new group, or that it has to wait.

        Raises:
            ClusterError: there was no room for too long.
        """
        now = time.monotonic()
        if not self._since:
            self._since = now
            # Ray Train ends the group before only once the next one has a size.
            release(ray.get_runtime_context().get_actor_id())
        size = self._size(free_places(self._needs))
        if size == self._sizes[-1] or (size and now - self._since > SETTLE_SECONDS):
            self._since = 0.0
            return ResizeDecision(num_workers=size, resources_per_worker=self._needs)
        if now - self._since > PLACE_SECONDS:
            raise ClusterError(
                f"no machine had room to train within {PLACE_SECONDS:.0f} s: each worker needs "
                f"{self._needs}; {ray_cluster.capacity()}",
                hint="add a machine, or use fewer --threads; run the same command again to resume",
            )
        time.sleep(POLL_SECONDS)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Tell a group that can grow to save a checkpoint and end; it starts again larger."""
        del worker_group_status
        started, size = worker_group_state.start_time, worker_group_state.num_workers
        now = time.monotonic()
        waits = now - max(started, self._looked) < (
            self.scaling_config.elastic_resize_monitor_interval_s
        )
        if size == self._sizes[-1] or self._told == started or waits:
            return NoopDecision()
        self._looked = now
        if self._size(size + free_places(self._needs)) > size:
            self._told = started
            deadline_ms = int((time.time() + GROW_SECONDS) * 1000)
            info = PreemptionInfo(deadline_ms=deadline_ms, preempted_node_to_ranks={})
            for worker in worker_group_state.workers:
                worker.actor.mark_preempt.remote(info)
        return NoopDecision()

    def after_controller_start(self, train_run_context: Any) -> None:
        """Request room for the largest group; the driver withdraws it."""
        del train_run_context
        ray_cluster.request_resources([self._needs] * self._sizes[-1])

    def _get_num_workers_for_resource_request(self) -> int:
        return self._sizes[-1]

    def _size(self, room: int) -> int:
        return max((size for size in self._sizes if size <= room), default=0)

    @property
    def _needs(self) -> dict[str, float]:
        return dict(self.scaling_config._resources_per_worker_not_none)


class Equipment(WorkerGroupCallback):  # type: ignore[misc]  # as above
    """Prepares each worker before it knows what for, by arguments of a call."""

    def __init__(self, *, hides_gpus: bool) -> None:
        """Say whether workers must see no GPU: those that reserve none would see all."""
        self._hides_gpus = hides_gpus

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        """Lend them the token for the Hub that this process was lent; return nothing."""
        for worker in workers:
            worker.execute_async(_equipped, hub.token_here(), self._hides_gpus)
        return {}


def _equipped(token: str, hides_gpus: bool) -> None:
    hub.lend(token)
    if hides_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
