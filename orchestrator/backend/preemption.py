"""Nodes that will be preempted: which are draining, and a watcher on each that polls its cloud."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._private import state as ray_state
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RaySystemError, RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.backend.cloud_notices import METADATA, Notice, watch
from orchestrator.backend.ray_cluster import joined
from planners.errors import ClusterError

COVER_SECONDS = 10.0  # between two checks for new nodes


def draining() -> Mapping[str, float]:
    """Return node id -> seconds left, of the nodes that are draining.

    Ray has no public call for this. If a release has moved the private one, no node is reported as
    draining: a preempted node is then handled as a lost one.
    """
    find = getattr(getattr(ray_state, "state", None), "get_draining_nodes", None)
    if find is None:
        return {}
    try:
        deadlines = find()  # node id -> milliseconds since the epoch, or 0 for none
    except (RaySystemError, RpcError):
        return {}  # the head node cannot be reached at the moment
    now = time.time()
    return {n: at / 1000 - now if at else float("inf") for n, at in deadlines.items()}


def drain(node: str, *, seconds: float, message: str, address: str = "") -> None:
    """Have Ray drain a node that is preempted in ``seconds``: nothing new is placed there.

    Args:
        node: Ray's hex id.
        seconds: until the machine is preempted.
        message: the reason, for Ray's own records.
        address: of the head node, ``host:port``; empty is the one this process is connected to.

    Raises:
        ClusterError: the head node refuses, or cannot be reached.
    """
    client = ray._raylet.GcsClient(address=address or ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + seconds) * 1000)
    try:
        accepted, why = client.drain_node(node, reason, message, deadline_ms)
    except (RaySystemError, RpcError) as error:
        raise ClusterError(f"node {node} cannot be drained: {error}") from error
    if not accepted:
        raise ClusterError(f"node {node} cannot be drained: {why}")


@contextlib.contextmanager
def attached(address: str) -> Iterator[str]:
    """Connect to a running cluster from one of its nodes; yield Ray's id of that node.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    joined(address)
    try:
        yield ray.get_runtime_context().get_node_id()
    finally:
        ray.shutdown()


def watchers(address: str) -> "contextlib.AbstractContextManager[Watchers | None]":
    """Return watchers for preemption notices; none on a cluster that is only this machine."""
    return contextlib.nullcontext() if address == "local" else Watchers()


class Watchers:
    """An actor on each node that polls for its cloud's preemption notice; a context manager.

    The actors reserve no cores, and end with the run.
    """

    def __init__(self, *, metadata: str = METADATA) -> None:
        """Start with no actors; ``metadata`` is the base URL of the clouds' metadata service."""
        self._metadata = metadata
        self._actors: dict[str, Any] = {}
        self._checked_at = -COVER_SECONDS

    def __enter__(self) -> "Watchers":
        """Start an actor on each node."""
        self.cover()
        return self

    def __exit__(self, *error: object) -> None:
        """End all actors."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def cover(self) -> None:
        """Start actors on new nodes; checks at most once in `COVER_SECONDS`."""
        now = time.monotonic()
        if now - self._checked_at < COVER_SECONDS:
            return
        self._checked_at = now
        for node in ray.nodes():
            name = node["NodeID"]
            # The driver is lost with the head node: it could not move any work.
            head = "node:__internal_head__" in node["Resources"]
            if node["Alive"] and not head and name not in self._actors:
                where = NodeAffinitySchedulingStrategy(name, soft=False)
                self._actors[name] = (
                    ray.remote(_Watcher)
                    .options(num_cpus=0, max_restarts=0, scheduling_strategy=where)
                    .remote()
                )
                self._actors[name].watch.remote(name, self._metadata)


class _Watcher:
    """Waits on one node for its preemption notice."""

    def watch(self, node: str, metadata: str) -> None:
        """Drain the node once there is a notice; return if no cloud answers."""

        def on_notice(notice: Notice) -> None:
            drain(node, seconds=notice.seconds, message=f"preemption notice from {notice.source}")

        watch(on_notice, base=metadata)
