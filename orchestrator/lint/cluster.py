"""Errors in a cluster file that Ray's own check misses, found before a machine is rented."""

import json
import re
from collections.abc import Iterator, Mapping

from orchestrator.backend import ray_cluster
from orchestrator.backend.capacity import mapping
from orchestrator.lint.cluster_access import access_findings
from orchestrator.lint.cluster_file import ClusterFile, Finding, read_cluster_file
from orchestrator.lint.cluster_nodes import CLOUDS, node_findings
from orchestrator.lint.cluster_rights import rights_findings, skypilot_findings
from orchestrator.lint.cluster_versions import version_findings

LEVELS = ("error", "warning", "note")


def lint(path: str) -> list[Finding]:
    """Return the findings of a cluster file of Ray or of SkyPilot, the worst first.

    Raises:
        ConfigError: the file cannot be read, or is no YAML mapping.
    """
    file = read_cluster_file(path)
    if "provider" not in file.values and {"run", "resources"} & file.values.keys():
        found = [*_skypilot(file), *skypilot_findings(file)]
    else:
        found = [
            *_schema(file),
            *node_findings(file),
            *access_findings(file),
            *rights_findings(file),
            *version_findings(file),
            *_start(file),
        ]
    return sorted(found, key=lambda f: (LEVELS.index(f.level), f.line, f.path))


def _schema(file: ClusterFile) -> Iterator[Finding]:
    refusal = ray_cluster.schema_refusal(file.values)
    if refusal:
        yield file.finding("error", (), f"Ray refuses it: {refusal}", "see Ray's cluster YAML")


def _start(file: ClusterFile) -> Iterator[Finding]:
    heads = list(file.commands("head_start_ray_commands"))
    starts = [(key, text) for key, text in heads if re.search(r"\bray start\b", text)]
    if not starts:
        yield file.finding(
            "error", ("head_start_ray_commands",),
            "Ray's defaults start the head: no token, a hung node detected only after a minute",
            "the head_start_ray_commands of cluster.yaml",
        )  # fmt: skip
    for key, text in starts:
        missing = _missing_health(text)
        if missing:
            yield file.finding(
                "warning", key,
                f"a hung node is detected only after a minute; not set: {', '.join(missing)}",
                f"--system-config='{_compact(ray_cluster.HEALTH_CHECK)}'",
            )  # fmt: skip
        if file.provider.get("type") in CLOUDS and "--autoscaling-config" not in text:
            yield file.finding(
                "error", key, "no autoscaler: no worker will ever start",
                "--autoscaling-config=~/ray_bootstrap_config.yaml",
            )  # fmt: skip
    for key, text in file.commands("worker_start_ray_commands"):
        if "--system-config" in text:
            yield file.finding(
                "error", key, "only the head accepts --system-config; a worker with it exits",
                "remove it; the head's setting applies to all nodes",
            )  # fmt: skip


def _missing_health(text: str) -> list[str]:
    found = re.search(r"--system-config[= ]'(\{.*?\})'", text)
    try:
        given = mapping(json.loads(found[1])) if found else {}
    except ValueError:
        given = {}
    slow = [
        k for k, limit in ray_cluster.HEALTH_CHECK.items() if not 0 < given.get(k, 0) <= 2 * limit
    ]
    return sorted(slow)


def _compact(settings: Mapping[str, int]) -> str:
    return json.dumps(dict(settings), separators=(",", ":"))


def _skypilot(file: ClusterFile) -> Iterator[Finding]:
    if mapping(file.values.get("resources")).get("use_spot") is not True:
        yield file.finding(
            "warning", ("resources", "use_spot"), "on-demand: three times the price, or more",
            "use_spot: true; the same command resumes a preempted run",
        )  # fmt: skip
    if mapping(file.values.get("resources")).get("ports"):
        yield file.finding(
            "error", ("resources", "ports"), "opens ports of the machine to the whole world",
            "remove ports; compress-cluster needs no open port",
        )  # fmt: skip
    text = str(file.values.get("run", ""))
    outs = [str(v) for k, v in mapping(file.values.get("envs")).items() if f"${k}" in text]
    if not re.search(r"(s3|gs)://", " ".join([text, *outs])):
        yield file.finding(
            "error", ("run",), "the run directory is on the machine's disk, and is lost with it",
            "--out s3://BUCKET/runs/NAME",
        )  # fmt: skip
    if not re.search(r"install.*(\.whl|compress[_-]cluster)", str(file.values.get("setup", ""))):
        yield file.finding(
            "error", ("setup",), "compress-cluster is not installed on the machine",
            "pip install the wheel that `make wheel` builds",
        )  # fmt: skip
