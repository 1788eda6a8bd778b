"""What each worker of a group that Ray Train started does: join the others, and train."""

import traceback
from collections.abc import Callable
from typing import Any

import ray.train
from torch import distributed

from actors.messages import TrainRequest
from actors.training.group import Alone, Group, Processes
from actors.training.loop import train
from orchestrator.backend.executor import FailureClass
from orchestrator.backend.ray_failures import GroupFailure, first_line, out_of_memory
from planners.errors import CompressionError


def train_in_group(config: dict[str, Any]) -> None:
    """Train what ``config["request"]`` asks for, as one of a group.

    Raises:
        GroupFailure: the group leaves, or something failed.
        CompressionError: what the training raised.
    """
    request: TrainRequest = config["request"]
    notice = _Notice()
    try:
        train(request, _joined(notice))
        if distributed.get_world_size() > 1:
            distributed.barrier()  # the first that ends by an error ends the others
    except CompressionError as error:
        error.add_note(traceback.format_exc())
        raise
    except Exception as error:
        raise GroupFailure(*_named(error)) from error
    if notice.came:
        # Ray Train takes a function that returns for one that has finished. The group starts again
        # where it may stay; if it had finished, it ends at once.
        raise GroupFailure(FailureClass.PREEMPTED, "a node of the group is about to be preempted")


class _Notice:
    """Whether the group has to leave; every worker must ask equally often."""

    came = False

    def __call__(self) -> bool:
        self.came = self.came or ray.train.get_preemption_info() is not None
        return self.came


class _OneWorker(Alone):
    """A group of one that may have to leave."""

    def __init__(self, leaves: Callable[[], bool]) -> None:
        self._leaves = leaves

    def leaves(self) -> bool:
        return self._leaves()


def _joined(notice: _Notice) -> Group:
    return Processes(notice) if distributed.get_world_size() > 1 else _OneWorker(notice)


def _named(error: Exception) -> tuple[FailureClass, str]:
    if out_of_memory(error):
        return FailureClass.OUT_OF_MEMORY, first_line(error)
    # Of gloo's errors only the text says so.
    if isinstance(error, distributed.DistError) or "gloo" in str(error):
        return FailureClass.WORKER_CRASHED, f"another worker is lost: {first_line(error)}"
    return FailureClass.DEFECT, traceback.format_exc()
