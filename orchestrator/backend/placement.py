"""How many workers there is room for, and what a lost controller of a group leaves reserved."""

from collections.abc import Mapping

import ray
from ray._private import state as ray_state
from ray._raylet import PlacementGroupID
from ray.core.generated import gcs_pb2
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from orchestrator.backend import preemption


def free_places(needs: Mapping[str, float]) -> int:
    """Return how many workers fit into what is free on nodes that are not draining."""
    leaving = preemption.draining()
    free = ray_state.available_resources_per_node()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return sum(
        int(min(free[node].get(kind, 0.0) // amount for kind, amount in needs.items() if amount))
        for node in alive & free.keys()
        if node not in leaving
    )


def release(controller: str) -> None:
    """End the workers of a controller, given by its hex id, and free what they reserve.

    Ray does that at the end of a run only.
    """
    for raw in ray_state.state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(raw)
        if group.creator_actor_id.hex() == controller:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
