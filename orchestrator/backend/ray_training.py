"""Start a group of workers by Ray Train, which joins them and starts them again after a loss.

Its controller is an actor that the driver starts and asks, as it does with workers: `fit` would
wait for it. Ray Train's checkpoints are not used: training resumes from those in the run directory.
"""

import contextlib
import importlib.util
import shutil
import tempfile
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError, RaySystemError, RayTaskError, RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.messages import TrainRequest
from actors.storage import hub
from orchestrator.backend import ray_cluster
from orchestrator.backend.executor import FailureClass, Resources, WorkerFailed, WorkerLost
from orchestrator.backend.placement import release
from orchestrator.backend.ray_failures import (
    SYSTEM_ERRORS,
    GroupFailure,
    first_line,
    of_a_call,
    reason_of,
)
from planners.errors import CompressionError, ConfigError

GROW_CHECK_SECONDS = 60.0  # between two checks whether a group can grow
ABORT_SECONDS = 10.0  # within which a controller ends its workers


def require_train() -> None:
    """Refuse what Ray Train needs and this machine lacks.

    Raises:
        ConfigError: a package is missing.
    """
    if importlib.util.find_spec("pandas") is None:
        raise ConfigError(
            "training of a whole model uses Ray Train, which needs pandas",
            hint="pip install 'compress-cluster[train]', on every machine that works on the run",
        )


def start(
    request: TrainRequest,
    *,
    num_workers: tuple[int, int],
    resources: Resources,
    name: str,
    grow_seconds: float = GROW_CHECK_SECONDS,
) -> "RayTraining":
    """Start a group, and return it while it is still starting.

    Args:
        request: what it trains.
        num_workers: at least, and at most.
        resources: of one worker.
        name: of its controller, in Ray's dashboard.
        grow_seconds: between two checks whether it can grow.

    Raises:
        ConfigError: a package is missing.
        WorkerLost: the controller does not start.
    """
    require_train()
    # Not at the top: they need that package, and a second.
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.util import ObjectRefWrapper

    from orchestrator.backend.train_policies import Equipment, FreeRoom, Restarts

    name = f"{name}-{uuid4().hex[:12]}"  # a name that was used before would resume
    folder = tempfile.mkdtemp(prefix="compress-cluster-train-")  # Ray Train insists on one
    how = ScalingConfig(
        num_workers=num_workers,
        use_gpu=bool(resources.num_gpus),
        resources_per_worker=resources.bundle,
        elastic_resize_monitor_interval_s=grow_seconds,
    )
    trainer = TorchTrainer(
        _in_group,
        train_loop_config={"request": request},
        torch_config=TorchConfig(backend="nccl" if resources.num_gpus else "gloo"),
        scaling_config=how,
        run_config=RunConfig(name=name, storage_path=folder),
    )
    backend = trainer.backend_config
    here = ray.get_runtime_context().get_node_id()
    controller = (
        ray.remote(TrainController)
        .options(
            name=name,
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(
            train_fn_ref=ObjectRefWrapper(trainer._get_train_func()),
            train_run_context=trainer.train_run_context,
            scaling_policy=FreeRoom(how, parts=request.recovery.parts),
            failure_policy=Restarts(trainer.run_config.failure_config),
            callbacks=[
                AcceleratorSetupCallback(backend, how),
                BackendSetupCallback(backend),
                Equipment(hides_gpus=not resources.num_gpus),
            ],
        )
    )
    training = RayTraining(controller, folder)
    training.run()
    return training


class RayTraining:
    """A group of Ray Train, as its controller knows it."""

    def __init__(self, controller: Any, folder: str) -> None:
        """Hold a controller; ``folder`` is removed at the end."""
        self._controller, self._folder = controller, folder
        self._run: Any = None

    def run(self) -> None:
        """Start its loop.

        Raises:
            WorkerLost: the controller does not start.
        """
        if token := hub.token_in_use():  # see `ray_executor._hosted`
            try:  # waits for it: its calls may overtake each other
                ray.get(self._controller.__ray_call__.remote(_lend, token))
            except SYSTEM_ERRORS as lost:
                self._release()
                raise WorkerLost(reason_of(lost), first_line(lost)) from lost
        self._run = self._controller.run.remote()

    def done(self) -> bool:
        """Return whether it has ended; this does not wait."""
        return bool(ray.wait([self._run], timeout=0, fetch_local=False)[0])

    def result(self) -> None:
        """Wait until it has ended, and release what it held.

        Raises:
            WorkerLost: its workers were lost too often, or its controller.
            WorkerFailed: the training raised an unexpected error.
            CompressionError: what the training itself raised, on any worker.
        """
        try:
            ray.get(self._run)
            error = ray.get(self._controller.get_result.remote()).error
        except RayTaskError as failed:
            raise of_a_call(failed) from failed
        except SYSTEM_ERRORS as lost:
            raise WorkerLost(reason_of(lost), first_line(lost)) from lost
        finally:
            self._release()
        if error is not None:
            raise explained(error) from error

    def cancel(self) -> None:
        """End the group at once, and release what it held."""
        if not self.done():
            self._controller.abort.remote()  # ends the controller too
            with contextlib.suppress(RayError):  # it has ended, or does not answer
                ray.get(self._run, timeout=ABORT_SECONDS)
        self._release()

    def _release(self) -> None:
        ray.kill(self._controller, no_restart=True)
        ray_cluster.request_resources([])
        with contextlib.suppress(RaySystemError, RpcError):  # without a head node nothing is held
            release(self._controller._actor_id.hex())
        shutil.rmtree(self._folder, ignore_errors=True)


def explained(error: Any) -> Exception:
    """Return what ended a group as one of the errors of `RayTraining.result`."""
    failures = getattr(error, "worker_failures", {0: getattr(error, "controller_failure", error)})
    causes = [getattr(each, "health_check_failure", each) for each in failures.values()]
    known = [_known(cause) for cause in causes]
    # The most telling first: a worker is often lost by another one's error.
    kinds = (CompressionError, WorkerFailed, WorkerLost)
    return next(each for kind in kinds for each in known if isinstance(each, kind))


def _known(cause: Exception) -> Exception:
    if isinstance(cause, SYSTEM_ERRORS):
        return WorkerLost(reason_of(cause), first_line(cause))
    if isinstance(cause, GroupFailure):
        defect = cause.kind is FailureClass.DEFECT
        return WorkerFailed(cause.text) if defect else WorkerLost(cause.kind, cause.text)
    return cause if isinstance(cause, CompressionError) else WorkerFailed(str(cause))


def _in_group(config: dict[str, Any]) -> None:
    from orchestrator.backend.train_worker import train_in_group  # the driver does not train

    train_in_group(config)


def _lend(controller: Any, token: str) -> None:
    del controller
    hub.lend(token)
