"""Access to a cluster: anyone who can reach it can run any code on it."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.backend.capacity import mapping
from orchestrator.lint.cluster_file import ClusterFile, Finding, Key

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    *STARTS,
)  # fmt: skip
SSH = 22
EXAMPLES = [ipaddress.ip_network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|AIza[0-9A-Za-z_\-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?:AWS_SECRET_ACCESS_KEY|HF_TOKEN)=[^\s$]{8,}"
)


def access_findings(file: ClusterFile) -> Iterator[Finding]:
    """Yield findings on access: open ports, no token, secrets in the file."""
    for key, text in file.commands(*STARTS):
        yield from _start(file, key, text)
    yield from _token(file)
    if file.provider.get("type") == "aws":
        yield from _ports(file)
    yield from _secrets(file, (), file.values)


def _start(file: ClusterFile, key: Key, text: str) -> Iterator[Finding]:
    for host in re.findall(r"--dashboard-host[= ]+['\"]?([^\s'\"]+)", text):
        if host not in LOOPBACK:
            yield file.finding(
                "error", key, f"the dashboard listens on {host}: its job API runs any command",
                "--dashboard-host=127.0.0.1, and `ray dashboard FILE` for a tunnel",
            )  # fmt: skip
    if "--ray-client-server-port" in text:
        yield file.finding(
            "warning", key, "Ray Client is a second, unused way into the cluster",
            "remove --ray-client-server-port; `compress-cluster submit` uses the job API",
        )  # fmt: skip


def _token(file: ClusterFile) -> Iterator[Finding]:
    mode = [
        (k, m) for k, t in file.commands(*COMMANDS) for m in re.findall(r"RAY_AUTH_MODE=(\w+)", t)
    ]
    for key, value in mode:
        if value != "token":
            yield file.finding(
                "error", key, f"RAY_AUTH_MODE={value}: anyone who reaches a port runs code",
                "RAY_AUTH_MODE=token",
            )  # fmt: skip
    for name in STARTS:
        starts = [(k, t) for k, t in file.commands(name) if re.search(r"\bray start\b", t)]
        for key, text in starts:
            if "RAY_AUTH_MODE=" not in text:
                yield file.finding(
                    "error", key, "starts Ray without its token; every node needs it",
                    "RAY_AUTH_MODE=token ray start ...",
                )  # fmt: skip
    mounts = mapping(file.values.get("file_mounts"))
    if not any(str(target).endswith(".ray/auth_token") for target in mounts):
        yield file.finding(
            "error", ("file_mounts",), "the nodes get no token, so they admit everybody or nobody",
            "~/.ray/auth_token: ~/.ray/auth_token, made by `ray get-auth-token --generate`",
        )  # fmt: skip


def _ports(file: ClusterFile) -> Iterator[Finding]:
    group = mapping(file.provider.get("security_group"))
    rules = group.get("IpPermissions")
    at: Key = ("provider", "security_group")
    if not isinstance(rules, list):
        yield file.finding(
            "warning", at, "Ray then creates a security group with ssh open to the whole world",
            "IpPermissions with port 22 and your own address, as in cluster.yaml",
        )  # fmt: skip
        return
    for index, rule in enumerate(rules):
        key = (*at, "IpPermissions", index)
        ranges = [str(mapping(r).get("CidrIp", "")) for r in mapping(rule).get("IpRanges") or []]
        low, high = mapping(rule).get("FromPort", 0), mapping(rule).get("ToPort", 65535)
        world = [r for r in ranges if r.endswith("/0")]
        if world and (low, high) != (SSH, SSH):
            yield file.finding(
                "error", key, f"ports {low}-{high} are open to the whole world",
                "only ssh, from your own address; use an ssh tunnel for the rest",
            )  # fmt: skip
        elif world:
            yield file.finding(
                "warning", key, "ssh is open to the whole world", "your own address, with /32"
            )
        if any(_is_example(r) for r in ranges):
            yield file.finding(
                "note", key, "this address is reserved for examples: you cannot log in",
                "your own address, with /32: curl https://checkip.amazonaws.com",
            )  # fmt: skip


def _is_example(text: str) -> bool:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return network.version == 4 and any(network.subnet_of(e) for e in EXAMPLES)  # type: ignore[arg-type] # noqa: PLR2004 both are of version 4


def _secrets(file: ClusterFile, key: Key, value: Any) -> Iterator[Finding]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _secrets(file, (*key, str(name)), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(file, (*key, index), inner)
    elif isinstance(value, str) and SECRETS.search(value):
        yield file.finding(
            "error", key, "a secret is written here; the file goes to every node and into its logs",
            "an instance profile (IamInstanceProfile, serviceAccounts), or a file in file_mounts",
        )  # fmt: skip
