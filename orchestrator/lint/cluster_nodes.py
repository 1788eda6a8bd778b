"""Node types: the head stays and does no work, the workers are spot and end when idle."""

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.backend.capacity import mapping
from orchestrator.lint.cluster_file import ClusterFile, Finding, Key

MAX_IDLE_MINUTES = 30
CLOUDS = ("aws", "gcp")


def node_findings(file: ClusterFile) -> Iterator[Finding]:
    """Yield findings on the node types of a cloud; on-premises files have none."""
    kind = file.provider.get("type")
    if kind not in CLOUDS:
        return
    yield from _limits(file)
    yield from _notices(file)
    for name, node in file.node_types.items():
        key: Key = ("available_node_types", name)
        config = mapping(node.get("node_config"))
        if name == file.head:
            yield from _head(file, key, node)
        else:
            yield from _worker(file, key, node)
        if kind == "aws":
            yield from _aws(file, key, config)


def is_spot(config: Mapping[str, Any]) -> bool:
    """Return whether a node_config, of AWS or GCP, requests a spot machine."""
    market = mapping(config.get("InstanceMarketOptions")).get("MarketType")
    scheduling = config.get("scheduling")
    settings = scheduling if isinstance(scheduling, list) else [scheduling]
    return market == "spot" or any(
        mapping(s).get("preemptible") is True or mapping(s).get("provisioningModel") == "SPOT"
        for s in settings
    )


def _limits(file: ClusterFile) -> Iterator[Finding]:
    idle = file.values.get("idle_timeout_minutes", 5)
    if isinstance(idle, int | float) and idle > MAX_IDLE_MINUTES:
        yield file.finding(
            "warning", ("idle_timeout_minutes",),
            f"an idle machine is paid for {idle:g} minutes more",
            f"{MAX_IDLE_MINUTES} or less; a run gets a new machine within minutes",
        )  # fmt: skip
    zones = str(file.provider.get("availability_zone", ""))
    spot = any(is_spot(mapping(n.get("node_config"))) for n in file.node_types.values())
    if spot and zones.count(",") < 1:
        yield file.finding(
            "warning", ("provider", "availability_zone"),
            "one zone: when it has no spot capacity, no worker starts",
            "several zones with commas, such as us-west-2a,us-west-2b",
        )  # fmt: skip
    if spot and file.provider.get("type") == "aws" and _caches(file):
        yield file.finding(
            "error", ("provider", "cache_stopped_nodes"),
            "spot machines cannot be stopped, only terminated: `ray down` would fail and they "
            "would still be billed",
            "cache_stopped_nodes: false",
        )  # fmt: skip


def _notices(file: ClusterFile) -> Iterator[Finding]:
    spot = any(is_spot(mapping(n.get("node_config"))) for n in file.node_types.values())
    starts = [text for _, text in file.commands("worker_start_ray_commands")]
    if spot and not any("compress-cluster watch-node" in text for text in starts):
        yield file.finding(
            "warning", ("worker_start_ray_commands",),
            "nothing watches for preemption notices of spot machines: their work is done "
            "again instead of handed over",
            "a last command: nohup compress-cluster watch-node > /tmp/watch-node.log 2>&1 &",
        )  # fmt: skip


def _caches(file: ClusterFile) -> bool:
    return file.provider.get("cache_stopped_nodes", True) is not False


def _head(file: ClusterFile, key: Key, node: Mapping[str, Any]) -> Iterator[Finding]:
    if is_spot(mapping(node.get("node_config"))):
        yield file.finding(
            "error", (*key, "node_config"),
            "the head is a spot machine: its preemption ends the driver, autoscaler and workers",
            "no spot options here; use spot for workers only",
        )  # fmt: skip
    alone = len(file.node_types) == 1
    if not alone and mapping(node.get("resources")).get("CPU") != 0:
        yield file.finding(
            "error", (*key, "resources", "CPU"),
            "workers can be placed on the head, where they slow the driver and have no GPU",
            "resources: {CPU: 0, GPU: 0} on the head",
        )  # fmt: skip


def _worker(file: ClusterFile, key: Key, node: Mapping[str, Any]) -> Iterator[Finding]:
    if node.get("min_workers", 0) != 0:
        yield file.finding(
            "error", (*key, "min_workers"),
            f"{node['min_workers']} machines are paid for while no run needs them",
            "min_workers: 0; a run requests what it needs",
        )  # fmt: skip
    if node.get("max_workers") == 0:
        yield file.finding(
            "error", (*key, "max_workers"), "no machine of this type can ever start",
            "max_workers: how many GPUs a run may have",
        )  # fmt: skip
    config = mapping(node.get("node_config"))
    if not is_spot(config):
        yield file.finding(
            "warning", (*key, "node_config"), "on-demand: three times the price of spot, or more",
            "AWS: InstanceMarketOptions: {MarketType: spot, ...}; GCP: scheduling: "
            "[{preemptible: true}]. A run survives the loss of workers",
        )  # fmt: skip


def _aws(file: ClusterFile, key: Key, config: Mapping[str, Any]) -> Iterator[Finding]:
    at = (*key, "node_config")
    if mapping(config.get("MetadataOptions")).get("HttpTokens") != "required":
        yield file.finding(
            "error", (*at, "MetadataOptions"),
            "anything that can make the machine fetch a URL can read its credentials (IMDSv1)",
            "MetadataOptions: {HttpTokens: required, HttpPutResponseHopLimit: 2}",
        )  # fmt: skip
    if str(config.get("ImageId", "")).lower() in ("", "latest_dlami"):
        yield file.finding(
            "error", (*at, "ImageId"),
            "Ray then uses an image of Ubuntu 18.04 with CUDA 11.2, on which the Python and torch "
            "needed here do not start",
            "ImageId: an image with Ubuntu 24.04 and an NVIDIA driver, as in cluster.yaml",
        )  # fmt: skip
    spot = mapping(mapping(config.get("InstanceMarketOptions")).get("SpotOptions"))
    if spot.get("SpotInstanceType", "one-time") != "one-time":
        yield file.finding(
            "error", (*at, "InstanceMarketOptions", "SpotOptions", "SpotInstanceType"),
            "a persistent request starts the machine again after `ray down`",
            "SpotInstanceType: one-time",
        )  # fmt: skip
    if spot.get("InstanceInterruptionBehavior", "terminate") != "terminate":
        yield file.finding(
            "error", (*at, "InstanceMarketOptions", "SpotOptions", "InstanceInterruptionBehavior"),
            "a machine that is stopped, not terminated, keeps its disk, which is billed",
            "InstanceInterruptionBehavior: terminate",
        )  # fmt: skip
