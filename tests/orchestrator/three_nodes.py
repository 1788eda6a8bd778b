"""A batch on a cluster of three nodes, two of which die under its worker; run by test_batch.py.

In a process of its own, because it connects to a cluster of its own.
"""

import json
import os
import sys
from pathlib import Path

from ray._private import state
from ray.cluster_utils import Cluster

from orchestrator.backend.ray_cluster import HEALTH_CHECK
from orchestrator.experiments.batch import do_batch
from orchestrator.experiments.batch_file import read_batch


class Storm:
    """Takes away the node under the worker at some of its microbatches and units."""

    def __init__(self, nodes, moments):
        self._nodes = {node.node_id: node for node in nodes}
        self._moments = moments
        self._seen = 0
        self.taken = 0

    def __call__(self, event):
        if event["kind"] in ("calibrate", "damage", "layer"):
            self._seen += 1
            if self._seen in self._moments:
                self._take()

    def _take(self):
        alive = [a for a in state.actors().values() if a["State"] == "ALIVE"]
        under = {actor["Address"]["NodeID"] for actor in alive} & self._nodes.keys()
        cluster.remove_node(self._nodes.pop(under.pop()), allow_graceful=False)
        self.taken += 1


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "_system_config": dict(HEALTH_CHECK),
            "include_dashboard": False,
        },
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(3)]
    try:
        storm = Storm(nodes, moments={4, 30})
        path = Path(sys.argv[1])
        path.write_text(path.read_text().replace("ADDRESS", cluster.address))
        file = read_batch(str(path))
        rows = do_batch(file, listener=storm, on_run=lambda _: None)
        print(json.dumps({"taken": storm.taken, "states": [row.state for row in rows]}))
    finally:
        cluster.shutdown()
