"""Versions: nodes that differ from the driver fail late, or change the bits of the result."""

import re
from collections.abc import Iterator
from importlib import metadata

from orchestrator.backend.capacity import mapping
from orchestrator.lint.cluster_access import COMMANDS
from orchestrator.lint.cluster_file import ClusterFile, Finding, Key

PACKAGE = "compress-cluster"
OLDEST_PYTHON = (3, 11)
WHEEL = re.compile(r"compress[_-]cluster(?:-|==)(\d+(?:\.\d+)*)")


def version_findings(file: ClusterFile) -> Iterator[Finding]:
    """Yield versions of Ray, Python and this package that differ from this machine's."""
    ray, ours = metadata.version("ray"), metadata.version(PACKAGE)
    commands = list(file.commands(*COMMANDS))
    for key, text in commands:
        for found in re.findall(r"\bray(?:\[[\w,]+\])?==([\w.]+)", text):
            if found != ray:
                yield file.finding(
                    "error", key, f"installs Ray {found}; the driver here has {ray}",
                    f"ray[default]=={ray}, or let constraints.txt pin it",
                )  # fmt: skip
        for found in WHEEL.findall(text):
            if found != ours:
                yield file.finding(
                    "error", key, f"installs {PACKAGE} {found}; this one is {ours}",
                    "make wheel, and install ~/compress-cluster/dist/*.whl",
                )  # fmt: skip
    if not any(re.search(r"install.*(\.whl|compress[_-]cluster)", text) for _, text in commands):
        yield file.finding(
            "error", ("setup_commands",), f"no command installs {PACKAGE} on the nodes",
            "~/compress-cluster/dist in file_mounts, and pip install of *.whl",
        )  # fmt: skip
    elif not any("constraints.txt" in text for _, text in commands):
        yield file.finding(
            "warning", ("setup_commands",),
            "versions depend on the day of the install: another torch, other bits",
            "pip install -c ~/compress-cluster/dist/constraints.txt ...",
        )  # fmt: skip
    yield from _images(file, ray)
    yield from _pythons(file)


def _images(file: ClusterFile, ray: str) -> Iterator[Finding]:
    docker = mapping(file.values.get("docker"))
    for name in ("image", "head_image", "worker_image"):
        match = re.search(r"rayproject/ray(?:-ml)?:([\d.]+)(?:-py3(\d+))?", str(docker.get(name)))
        if match and match[1] != ray:
            yield file.finding(
                "error", ("docker", name), f"contains Ray {match[1]}; the driver here has {ray}",
                f"rayproject/ray:{ray}-...",
            )  # fmt: skip


def _pythons(file: ClusterFile) -> Iterator[Finding]:
    """Yield Pythons that are too old, or not one on all nodes: Ray's workers must agree."""
    docker = mapping(file.values.get("docker"))
    found: list[tuple[Key, int]] = [
        (key, int(minor))
        for key, text in file.commands(*COMMANDS)
        for minor in re.findall(r"\bpython3\.(\d+) -m venv", text)
    ]
    for name in ("image", "head_image", "worker_image"):
        match = re.search(r"rayproject/ray\S*-py3(\d+)", str(docker.get(name)))
        if match:
            found.append((("docker", name), int(match[1])))
    for key, minor in found:
        if (3, minor) < OLDEST_PYTHON:
            yield file.finding(
                "error", key, f"Python 3.{minor} is too old for {PACKAGE}", "python3.11 or newer"
            )
        if minor != found[0][1]:
            yield file.finding(
                "error", key, f"Python 3.{minor} here, 3.{found[0][1]} on other nodes",
                "one Python on all nodes",
            )  # fmt: skip
