"""A Ray cluster of several raylets on this machine, whose nodes can be lost in every way.

Processes are found and signalled by their ids alone, so other Ray clusters here are left in peace.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from orchestrator.backend.ray_cluster import HEALTH_CHECK

STORE_BYTES = 100 * 2**20
ACTORS = ("ray::Stage", "ray::Evaluator")  # how Ray names the processes of ours


class SpotCluster:
    """A head that takes no work, and so many nodes of one core each.

    What is lost stays lost until `refill`, which stands for the machines that a cloud gives again.
    """

    def __init__(self, num_nodes: int) -> None:
        """Start the head and the nodes."""
        self._size = num_nodes
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": STORE_BYTES,
                "_system_config": dict(HEALTH_CHECK),
            },
        )
        self._nodes: list[Any] = []
        self._lost: list[Any] = []
        self.refill()

    @property
    def address(self) -> str:
        """Where a driver connects."""
        return str(self._cluster.address)

    def refill(self) -> None:
        """Start nodes until there are as many as at first; bury those that were lost."""
        for node in self._lost:
            for pid in _family(node):
                _signal(pid, signal.SIGKILL)
            self._cluster.remove_node(node, allow_graceful=False)
        self._lost = []
        while len(self._nodes) < self._size:
            node = self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            self._nodes.append(node)

    def add(self) -> None:
        """Start one more node at once, as spare capacity does."""
        node = self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, wait=False)
        self._nodes.append(node)

    def working(self) -> list[Any]:
        """Return the nodes that run a process of ours, the busiest first."""
        count = {id(node): len(_actors(node)) for node in self._nodes}
        busy = [node for node in self._nodes if count[id(node)]]
        return sorted(busy, key=lambda node: -count[id(node)])

    def kill(self, node: Any) -> None:
        """Lose a node without notice: its raylet and all its processes end at once."""
        self._give_up(node)
        for pid in _family(node):
            _signal(pid, signal.SIGKILL)

    def freeze(self, node: Any) -> None:
        """Lose a node as a machine is lost whose connections nobody closes."""
        self._give_up(node)
        for pid in _family(node):
            _signal(pid, signal.SIGSTOP)

    def kill_worker(self, node: Any) -> None:
        """End one process of ours on a node that stays."""
        for pid in _actors(node)[:1]:
            _signal(pid, signal.SIGKILL)

    def drain(self, node: Any, *, seconds: int) -> None:
        """Announce that a node will be taken away, as a cloud does."""
        ray = Path(sys.executable).with_name("ray")
        subprocess.run(
            [
                *(str(ray), "drain-node", "--address", self.address, "--node-id", node.node_id),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"),
                *("--deadline-remaining-seconds", str(seconds)),
            ],
            check=False,
            capture_output=True,
        )

    def close(self) -> None:
        """End everything."""
        for node in (*self._nodes, *self._lost):
            for pid in _family(node):
                _signal(pid, signal.SIGKILL)
        self._cluster.shutdown()

    def _give_up(self, node: Any) -> None:
        self._nodes.remove(node)
        self._lost.append(node)


def _family(node: Any) -> list[int]:
    """Return the raylet of a node and all processes below it."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int(
                    (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                )
                children[parent].append(int(entry.name))
    found = [_raylet(node)]
    for pid in found:  # grows while it is walked
        found += children[pid]
    return found


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _actors(node: Any) -> list[int]:
    """Return the processes of ours on a node."""
    found = []
    for pid in _family(node):
        with contextlib.suppress(OSError):
            if (
                (Path("/proc") / str(pid) / "cmdline")
                .read_text(encoding="utf-8")
                .startswith(ACTORS)
            ):
                found.append(pid)
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
