"""Node types: the head stays and does no work, the workers are spot and go away when idle."""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from orchestrator.backend.capacity import mapping
from orchestrator.lint.cluster_file import ClusterFile, Finding, Key, Level
from planners.spelling import nearest

MAX_IDLE_MINUTES = 30
CLOUDS = ("aws", "gcp")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.\-/]{0,61}[A-Za-z0-9])?")
GCP_KEYS = (
    "machineType", "disks", "scheduling", "guestAccelerators", "metadata", "serviceAccounts",
    "labels", "networkInterfaces", "tags", "minCpuPlatform", "sourceMachineImage",
    "canIpForward", "shieldedInstanceConfig", "reservationAffinity", "advancedMachineFeatures",
    "confidentialInstanceConfig", "deletionProtection", "description", "displayDevice",
    "hostname", "privateIpv6GoogleAccess", "networkPerformanceConfig", "resourcePolicies",
    "params",
)  # fmt: skip
GCP_SCHEDULING = (
    "preemptible", "onHostMaintenance", "automaticRestart", "provisioningModel",
    "instanceTerminationAction", "nodeAffinities", "minNodeCpus", "maxRunDuration",
)  # fmt: skip


def node_findings(file: ClusterFile) -> Iterator[Finding]:
    """Yield what is wrong with the node types of a cloud; machines one owns have none."""
    kind = file.provider.get("type")
    if kind not in CLOUDS:
        return
    yield from _limits(file)
    yield from _notices(file)
    if file.head not in file.node_types:
        known = ", ".join(file.node_types)
        yield file.finding(
            "error", ("head_node_type",), f"{file.head or 'nothing'!r} is no node type",
            f"name one of available_node_types: {known}",
        )  # fmt: skip
    for name, node in file.node_types.items():
        key: Key = ("available_node_types", name)
        config = mapping(node.get("node_config"))
        yield from _unknown_settings(file, key, config)
        yield from _labels(file, key, node)
        if name == file.head:
            yield from _head(file, key, node)
        else:
            yield from _worker(file, key, node)
        if kind == "aws":
            yield from _aws(file, key, config)


def is_spot(config: Mapping[str, Any]) -> bool:
    """Return whether a node_config, of AWS or GCP, asks for a spot machine."""
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
            f"a machine that nobody uses is paid for {idle:g} minutes more",
            f"{MAX_IDLE_MINUTES} or less; a run takes a machine back within minutes",
        )  # fmt: skip
    zones = str(file.provider.get("availability_zone", ""))
    spot = any(is_spot(mapping(n.get("node_config"))) for n in file.node_types.values())
    if spot and zones.count(",") < 1:
        yield file.finding(
            "warning", ("provider", "availability_zone"),
            "one zone: when its spot market is empty, no worker comes",
            "several zones with commas, such as us-west-2a,us-west-2b",
        )  # fmt: skip
    if spot and file.provider.get("type") == "aws" and _caches(file):
        yield file.finding(
            "error", ("provider", "cache_stopped_nodes"),
            "spot machines cannot be stopped, only ended: `ray down` would fail and they would be "
            "paid for",
            "cache_stopped_nodes: false",
        )  # fmt: skip


def _notices(file: ClusterFile) -> Iterator[Finding]:
    spot = any(is_spot(mapping(n.get("node_config"))) for n in file.node_types.values())
    starts = [text for _, text in file.commands("worker_start_ray_commands")]
    if spot and not any("compress-cluster watch-node" in text for text in starts):
        yield file.finding(
            "warning", ("worker_start_ray_commands",),
            "nobody listens for the notice that a spot machine is about to go: its work is done "
            "again instead of handed over",
            "a last command: nohup compress-cluster watch-node > /tmp/watch-node.log 2>&1 &",
        )  # fmt: skip


def _caches(file: ClusterFile) -> bool:
    return file.provider.get("cache_stopped_nodes", True) is not False


def _head(file: ClusterFile, key: Key, node: Mapping[str, Any]) -> Iterator[Finding]:
    if is_spot(mapping(node.get("node_config"))):
        yield file.finding(
            "error", (*key, "node_config"),
            "the head is a spot machine: with it the driver, the autoscaler and every worker go",
            "no spot options here; spot belongs on workers",
        )  # fmt: skip
    alone = len(file.node_types) == 1
    if not alone and mapping(node.get("resources")).get("CPU") != 0:
        yield file.finding(
            "error", (*key, "resources", "CPU"),
            "the head takes work: a worker there starves the driver and waits for no GPU",
            "resources: {CPU: 0, GPU: 0} on the head",
        )  # fmt: skip


def _worker(file: ClusterFile, key: Key, node: Mapping[str, Any]) -> Iterator[Finding]:
    if node.get("min_workers", 0) != 0:
        yield file.finding(
            "error", (*key, "min_workers"),
            f"{node['min_workers']} machines are paid for while no run needs them",
            "min_workers: 0; a run asks for what it needs",
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


def _labels(file: ClusterFile, key: Key, node: Mapping[str, Any]) -> Iterator[Finding]:
    labels = mapping(node.get("labels"))
    for name, value in labels.items():
        if not LABEL.fullmatch(str(name)) or not LABEL.fullmatch(str(value)):
            yield file.finding(
                "error", (*key, "labels", str(name)),
                f"{name!r}: {value!r} is no label; Ray takes it and matches nothing",
                "letters, digits, - _ . and no blank",
            )  # fmt: skip
    spot = is_spot(mapping(node.get("node_config")))
    market = labels.get("market")
    right = "spot" if spot else "on-demand"
    if market != right:
        level: Level = "warning" if market is None else "error"
        yield file.finding(
            level, (*key, "labels", "market"),
            f"says {market!r} of a machine that is {right}",
            f"labels: {{market: {right}}}",
        )  # fmt: skip
    has_gpu = mapping(node.get("resources")).get("GPU", 0)
    if isinstance(has_gpu, int | float) and has_gpu > 0 and "gpu" not in labels:
        yield file.finding(
            "warning", (*key, "labels", "gpu"), "does not say which GPU this is",
            "labels: {gpu: l40s}; a result has the same bits on one class of device only",
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
            "Ray then takes an image of Ubuntu 18.04 with CUDA 11.2, on which no Python and torch "
            "of ours start",
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
            "a machine that is stopped, not ended, keeps its disk and its bill",
            "InstanceInterruptionBehavior: terminate",
        )  # fmt: skip


def _unknown_settings(file: ClusterFile, key: Key, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield settings of a machine that its cloud does not know; Ray passes them on unread."""
    at = (*key, "node_config")
    if file.provider.get("type") == "aws":
        shapes = json.loads(
            resources.files("orchestrator.lint").joinpath("ec2.json").read_text(encoding="utf-8")
        )
        known = {**shapes["RunInstancesRequest"], "SubnetIds": ""}  # Ray's own, a choice of subnets
        yield from _against(file, at, config, {**shapes, "RunInstancesRequest": known})
        return
    yield from (_unknown(file, (*at, n), GCP_KEYS) for n in config if n not in GCP_KEYS)
    scheduling = config.get("scheduling")
    for setting in scheduling if isinstance(scheduling, list) else [scheduling]:
        wrong = [n for n in mapping(setting) if n not in GCP_SCHEDULING]
        yield from (_unknown(file, (*at, "scheduling", n), GCP_SCHEDULING) for n in wrong)


def _against(
    file: ClusterFile,
    key: Key,
    value: object,
    shapes: Mapping[str, Mapping[str, str]],
    shape: str = "RunInstancesRequest",
) -> Iterator[Finding]:
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _against(file, (*key, index), each, shapes, shape)
        return
    for name, inner in mapping(value).items():
        if name not in shapes[shape]:
            yield _unknown(file, (*key, name), shapes[shape])
        elif shapes[shape][name]:
            yield from _against(file, (*key, name), inner, shapes, shapes[shape][name])


def _unknown(file: ClusterFile, key: Key, known: Any) -> Finding:
    near = nearest(str(key[-1]), known)
    fix = f"did you mean {near}?" if near else f"known here: {', '.join(known)}"
    why = "the cloud has no such setting; Ray does not look, and the first machine fails"
    return file.finding("error", key, why, fix)
