"""Several nodes on one machine: raylets, with their workers, to be killed, frozen and drained."""

import contextlib
import os
import signal
import time
from collections import Counter

import psutil
import ray
from ray.cluster_utils import Cluster

from orchestrator.backend import ray_cluster as ours
from orchestrator.backend.ray_executor import RayExecutor

RECORDED = ("statistics", "basis", "layer")  # kinds of events, each after a unit's record


class Nodes:
    """A head without cores, and nodes with one core each; a context manager."""

    def __init__(self, num_nodes):
        self._num_nodes = num_nodes
        self._stopped = []

    def __enter__(self):
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": 80 * 2**20,
                "_system_config": dict(ours.HEALTH_CHECK),
            },
        )
        self.nodes = [self.add() for _ in range(self._num_nodes)]
        self._cluster.wait_for_nodes()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        return self

    def __exit__(self, *error):
        for pid in self._stopped:
            signal_all([pid], signal.SIGCONT)
        ray.shutdown()
        self._cluster.shutdown()

    @property
    def address(self):
        return self._cluster.address

    def add(self):
        """Start one more node."""
        return self._cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def kill(self, node):
        """Lose a node without notice: its raylet and its workers, at once."""
        signal_all(self.processes(node), signal.SIGKILL)
        node.all_processes["raylet"][0].process.wait(10)

    def freeze(self, node):
        """Lose a node whose connections stay open, as a machine that is gone from the network."""
        found = self.processes(node)
        self._stopped += found
        signal_all(found, signal.SIGSTOP)

    def refill(self):
        """Put new nodes in the place of those that were lost."""
        lost = [node for node in self.nodes if self._is_lost(node)]
        for node in lost:
            self._cluster.remove_node(node, allow_graceful=False)
            self.nodes.remove(node)
            self.nodes.append(self.add())
        self._cluster.wait_for_nodes()

    def _is_lost(self, node):
        raylet = node.all_processes["raylet"][0].process
        return raylet.poll() is not None or raylet.pid in self._stopped

    def processes(self, node):
        """Return the process ids of a node: its raylet, and all that it started."""
        raylet = node.all_processes["raylet"][0].process.pid
        try:
            started = psutil.Process(raylet).children(recursive=True)
        except psutil.NoSuchProcess:  # a drained node that had nothing to do ends by itself
            return []
        return [raylet, *(child.pid for child in started)]


class WatchedExecutor(RayExecutor):
    """Remembers where each worker was, so that a test can disturb that place."""

    def __init__(self):
        super().__init__()
        self.places = {}
        self._settling = {}

    def spawn(self, actor_class, *args, resources, name):
        handle = super().spawn(actor_class, *args, resources=resources, name=name)
        self._settling[handle] = name.rpartition("-")[0]
        return handle

    def locate(self, handle):
        ticket = super().locate(handle)
        self._settling[ticket] = self._settling.pop(handle)
        return ticket

    def there(self, worker):
        """Return that worker, or another one where it is still on its way."""
        return worker if worker in self.places else min(self.places)

    def result(self, ticket):
        found = super().result(ticket)
        if ticket in self._settling:
            self.places[self._settling.pop(ticket)] = found
        return found


class Disturbance:
    """A listener that does something once, when so many events of some kind have been seen."""

    def __init__(self, kind, count, act):
        self._kind, self._left, self._act = kind, count, act
        self.at = None
        self.events = []

    def __call__(self, event):
        self.events.append(event)
        if event["kind"] == self._kind:
            self._left -= 1
            if self._left == 0:
                self.at = time.time()
                self._act()

    def kinds(self):
        return [event["kind"] for event in self.events]

    def recorded_once(self):
        """Return whether units were recorded, and none of them again."""
        times = Counter(e["unit"] for e in self.events if e["kind"] in RECORDED)
        return set(times.values()) == {1}

    def seconds_until(self, kind):
        """Return how long after the disturbance the first event of a kind came."""
        return (
            next(e["at"] for e in self.events if e["kind"] == kind and e["at"] > self.at) - self.at
        )


def signal_all(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def node_of(nodes, executor, worker):
    """Return the node that a worker is on."""
    wanted = executor.places[worker].node
    return next(node for node in nodes.nodes if node.node_id == wanted)
