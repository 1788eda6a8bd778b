"""How far an autoscaled cluster can grow: from its file, as Ray counts live nodes only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` writes the file on the head node


def max_resources(values: Mapping[str, Any], resource: str) -> float:
    """Return how much of a resource a cluster file's node types offer when all have started."""
    types = mapping(values.get("available_node_types"))
    left = float(values.get("max_workers", 0))
    head = values.get("head_node_type")
    offers = []
    total = 0.0
    for name, node in types.items():
        each = float(mapping(mapping(node).get("resources")).get(resource, 0) or 0)
        if name == head:
            total += each
        else:
            offers.append((each, float(mapping(node).get("max_workers", left))))
    for each, count in sorted(offers, reverse=True):
        taken = min(count, left)
        total, left = total + each * taken, left - taken
    return total


def awaited(values: Mapping[str, Any], num_nodes: int) -> int:
    """Return how many of the user's own machines listed in a cluster file have not joined yet.

    Their resources are unknown until they join: `ray up` returns once the head node runs.
    """
    provider = mapping(values.get("provider"))
    if provider.get("type") != "local":
        return 0
    return max(0, 1 + len(provider.get("worker_ips") or ()) - num_nodes)


def cluster_file_here() -> Mapping[str, Any]:
    """Return the cluster file that made this machine a head; empty on any other machine."""
    try:
        return mapping(yaml.safe_load(BOOTSTRAP.expanduser().read_text(encoding="utf-8")))
    except (OSError, RuntimeError, ValueError, yaml.YAMLError):
        return {}


def mapping(value: object) -> Mapping[str, Any]:
    """Return a value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}


LENT = "lent to one job: "  # before a secret: Ray's errors quote a package's first bytes
