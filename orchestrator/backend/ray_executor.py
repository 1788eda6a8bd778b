"""The executor that runs calls on a Ray cluster.

Actors are plain classes; `Host` makes them Ray actors here and nowhere else, so that a test can
build and call them like any object. One thread waits for answers and fetches only small ones that
are ready: a thread blocked on a large or lost object stalls Ray's own failure handling.
"""

import contextlib
import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.messages import TrainRequest
from actors.storage import hub
from actors.worker.host import Host
from orchestrator.backend import preemption, ray_cluster
from orchestrator.backend.executor import (
    ActorLocation,
    EarlyActor,
    Resources,
    Training,
    WorkerLost,
)
from orchestrator.backend.ray_failures import SYSTEM_ERRORS, first_line, of_a_call, reason_of

STACK_SIGNAL = signal.SIGUSR2
STACK_SECONDS = 5.0  # within which a worker's node returns its stack trace
STACK_FILE = "compress-cluster-stack-"  # followed by the process id


class RayExecutor:
    """Runs every call on the Ray cluster this process is connected to."""

    def __init__(
        self,
        *,
        watchers: preemption.Watchers | None = None,
        early: list[EarlyActor] | None = None,
    ) -> None:
        """Use the current connection.

        Args:
            watchers: also cover nodes that join during the run.
            early: processes that run already; `spawn` takes them out of this list first.
        """
        self._watchers = watchers
        self._early = [] if early is None else early

    def spawn(self, actor_class: type, *args: Any, resources: Resources, name: str) -> Any:
        """Return the handle of a new actor that Ray will not restart by itself."""
        for each in self._early:
            if (each.module, each.resources) == (actor_class.__module__, resources):
                self._early.remove(each)
                each.handle.build.remote(actor_class, *args)
                return each.handle
        return _hosted(actor_class.__name__, actor_class, *args, resources=resources, name=name)

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Start a call and return its object refs; nothing is fetched."""
        tickets = handle.call.options(num_returns=num_returns, name=label).remote(method, *args)
        return tickets if num_returns == 1 else tuple(tickets)  # Ray gives a list

    def locate(self, handle: Any) -> Any:
        """Return a ticket that answers once the actor's process runs."""
        return handle.__ray_call__.remote(_settled)

    def ready(self, tickets: Sequence[Any], *, seconds: float) -> list[Any]:
        """Wait for the first answer; return all tickets that are ready then."""
        done, _ = ray.wait(list(tickets), num_returns=1, timeout=seconds, fetch_local=False)
        if done and len(tickets) > 1:
            done, _ = ray.wait(
                list(tickets), num_returns=len(tickets), timeout=0, fetch_local=False
            )
        return list(done)

    def result(self, ticket: Any) -> Any:
        """Fetch a small answer; distinguish a lost argument from a lost worker."""
        try:
            return ray.get(ticket)
        except RayTaskError as error:
            raise of_a_call(error) from error
        except SYSTEM_ERRORS as error:
            raise WorkerLost(reason_of(error), first_line(error)) from error

    def train(
        self,
        request: TrainRequest,
        *,
        num_workers: tuple[int, int],
        resources: Resources,
        name: str,
    ) -> Training:
        """Start a group of Ray Train; nothing here waits for it."""
        from orchestrator.backend.ray_training import start  # needs pandas, and a second or two

        return start(request, num_workers=num_workers, resources=resources, name=name)

    def kill(self, handle: Any) -> None:
        """End the actor's process; Ray raises nothing if it has ended already."""
        ray.kill(handle, no_restart=True)

    def kill_process(self, where: ActorLocation) -> None:
        """Kill a process by a task on its own node, without waiting for it."""
        if where.pid:
            _run_on_same_node(where, _ended)

    def stack(self, where: ActorLocation) -> str:
        """Return a worker's stack trace, written on a signal from a task on the worker's own node.

        The worker is not called: it may hold the interpreter, or wait for ever in a library.
        """
        if not where.pid:
            return ""
        try:
            found: str = ray.get(_run_on_same_node(where, _shown_stack), timeout=STACK_SECONDS)
        except GetTimeoutError:
            return f"its node did not answer within {STACK_SECONDS:g} s"
        except RayError as error:
            return f"its node cannot be reached: {first_line(error)}"
        return found

    def draining(self) -> Mapping[str, float]:
        """Return node -> seconds left, of the nodes that are draining."""
        if self._watchers is not None:
            self._watchers.cover()
        return preemption.draining()

    def request_resources(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Request resources from the autoscaler, if there is one."""
        ray_cluster.request_resources(bundles)

    def capacity(self) -> str:
        """Return the cluster's total and free CPUs and GPUs as text."""
        return ray_cluster.capacity()


def spawn_early(module: str, *, resources: Resources, shown: str) -> EarlyActor:
    """Start the process of an actor whose class is in a module; it imports that meanwhile.

    ``shown`` is its name in Ray's dashboard.
    """
    kind, name = module.rpartition(".")[2].title(), f"{shown}-{uuid4().hex[:12]}"
    handle = _hosted(kind, module, resources=resources, name=name, shown=shown)
    return EarlyActor(module=module, resources=resources, handle=handle)


def _hosted(kind: str, *args: Any, resources: Resources, name: str, **how: Any) -> Any:
    """Return the handle of a new `Host`, which Ray shows as an actor of the class ``kind``."""
    remote = ray.remote(type(kind, (Host,), {})).options(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        max_restarts=0,
        max_task_retries=0,
        name=name,
    )
    handle = remote.remote(*args, **how)
    if not resources.num_gpus and not resources.any_gpu:
        # Not by a runtime environment: Ray would need a second or two to start its process.
        handle.__ray_call__.remote(_hide_gpus)
    if token := hub.token_in_use():
        # As an argument of a call: it is sent from process to process, and appears in no
        # environment, no description of the actor or its call, and no file.
        handle.__ray_call__.remote(_lend, token)
    return handle


def _hide_gpus(actor: Any) -> None:
    """Keep this process from using a GPU, before it has used one: a CPU actor would see all."""
    del actor
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _lend(actor: Any, token: str) -> None:
    """Let this process read from the Hub with its driver's token; the actor's first call."""
    del actor
    hub.lend(token)


def _settled(actor: Any) -> ActorLocation:
    """Return where this process runs; make it write its stack trace whenever it gets the signal."""
    del actor
    _remove_stale()
    descriptor, path = tempfile.mkstemp(prefix=f"{STACK_FILE}{os.getpid()}-", suffix=".txt")
    # In C, at once, whatever the interpreter is doing.
    faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True)
    node = ray.get_runtime_context().get_node_id()
    return ActorLocation(node=node, pid=os.getpid(), stack_file=path)


def _remove_stale() -> None:
    """Remove the stack files of ended processes: a killed worker cannot remove its own."""
    for path in Path(tempfile.gettempdir()).glob(f"{STACK_FILE}[0-9]*-*"):
        with contextlib.suppress(ValueError, OSError):  # another user's process, or file
            pid = int(path.name.removeprefix(STACK_FILE).partition("-")[0])
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                path.unlink()


def _run_on_same_node(where: ActorLocation, work: Callable[[ActorLocation], Any]) -> Any:
    """Start a task that reserves no core on the node of a process; return its ticket."""
    task = ray.remote(work).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(where.node, soft=False),
    )
    return task.remote(where)


def _ended(where: ActorLocation) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(where.pid, signal.SIGKILL)


def _shown_stack(where: ActorLocation) -> str:
    path = Path(where.stack_file)
    before = path.stat().st_size
    try:
        os.kill(where.pid, STACK_SIGNAL)
    except ProcessLookupError:
        return "its process no longer runs"
    for _ in range(20):
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8", errors="replace")[before:]
            if text:
                return text
    return "its process does not react to signals: it is stopped, or waiting for a device"
