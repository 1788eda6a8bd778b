"""Permissions of nodes: the bucket of the run, the Hub, and the head's right to start workers."""

import re
from collections.abc import Iterator
from typing import Any

from actors.storage.sources import HUB_ALIASES
from orchestrator.backend.capacity import mapping
from orchestrator.lint.cluster_access import COMMANDS
from orchestrator.lint.cluster_file import ClusterFile, Finding, Key

STORES = {"aws": "s3://", "gcp": "gs://"}
SETTINGS = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}
FIXES = {
    "aws": "IamInstanceProfile: {Name: compress-cluster-worker}, which "
    "`python examples/aws_roles.py BUCKET` creates",
    "gcp": "serviceAccounts: [{email: ..., scopes: "
    "[https://www.googleapis.com/auth/devstorage.read_write]}]",
}
# What Ray's autoscaler on the head imports, and no other package of ours brings.
AUTOSCALERS = {"aws": "boto3", "gcp": "google-api-python-client"}
SCOPES = ("devstorage.read_write", "devstorage.full_control", "cloud-platform")
HUB_TOKEN = re.compile(r"huggingface/(token|stored_tokens)$")


def rights_findings(file: ClusterFile) -> Iterator[Finding]:
    """Yield missing permissions of nodes, and credentials that are copied to nodes."""
    kind = str(file.provider.get("type"))
    if kind in SETTINGS:
        for name, node in file.node_types.items():
            key: Key = ("available_node_types", name, "node_config")
            config = mapping(node.get("node_config"))
            if name != file.head:
                yield from _worker(file, kind, key, config)
            elif kind == "aws":
                yield from _aws_head(file, key, config)
        yield from _autoscaler(file, AUTOSCALERS[kind])
    yield from _hub_token(file)


def skypilot_findings(file: ClusterFile) -> Iterator[Finding]:
    """Yield a gated model whose token the machine of a SkyPilot task does not get."""
    given = {**mapping(file.values.get("envs")), **mapping(file.values.get("secrets"))}
    text = f"{file.values.get('run', '')} {' '.join(map(str, given.values()))}"
    gated = [name for name in HUB_ALIASES if re.search(rf"(?<![\w.-]){name}(?![\w.-])", text)]
    if gated and "HF_TOKEN" not in given:
        yield file.finding(
            "error", ("secrets",), f"{gated[0]} requires a token, and the machine gets none",
            "secrets: {HF_TOKEN: null}, and `sky jobs launch --secret HF_TOKEN`",
        )  # fmt: skip


def _worker(file: ClusterFile, kind: str, key: Key, config: Any) -> Iterator[Finding]:
    found = config.get(SETTINGS[kind])
    why = f"Ray gives rights to the head only: these machines cannot use a {STORES[kind]} bucket"
    if kind == "gcp" and found and not any(scope in str(found) for scope in SCOPES):
        why, found = "no scope lets these machines write to a gs:// bucket", None
    if not found:
        yield file.finding("error", (*key, SETTINGS[kind]), why, FIXES[kind])


def _aws_head(file: ClusterFile, key: Key, config: Any) -> Iterator[Finding]:
    """Yield a head that cannot start its workers: Ray's own profile allows neither."""
    workers = [mapping(n.get("node_config")) for t, n in file.node_types.items() if t != file.head]
    passes = any("IamInstanceProfile" in each for each in workers)
    resolves = any(str(each.get("ImageId", "")).startswith("resolve:ssm:") for each in workers)
    if (passes or resolves) and not config.get("IamInstanceProfile"):
        what = "pass a role to a worker" if passes else "look up the image of a worker"
        yield file.finding(
            "error", (*key, "IamInstanceProfile"),
            f"the profile that Ray creates for the head may not {what}: no worker would start",
            "IamInstanceProfile: {Name: compress-cluster-head}, which "
            "`python examples/aws_roles.py BUCKET` creates",
        )  # fmt: skip


def _autoscaler(file: ClusterFile, package: str) -> Iterator[Finding]:
    installs = [text for _, text in file.commands(*COMMANDS) if "install" in text]
    if not any(package in text for text in installs) and "docker" not in file.values:
        yield file.finding(
            "error", ("setup_commands",),
            f"the autoscaler needs {package}, and the setup does not install it: no worker starts",
            f"pip install {package}",
        )  # fmt: skip


def _hub_token(file: ClusterFile) -> Iterator[Finding]:
    for target, source in mapping(file.values.get("file_mounts")).items():
        if HUB_TOKEN.search(str(target)) or HUB_TOKEN.search(str(source)):
            yield file.finding(
                "warning", ("file_mounts", str(target)),
                "your Hub token would be on every node, readable by every program there",
                "remove it: `submit` passes it to the run only, in memory",
            )  # fmt: skip
