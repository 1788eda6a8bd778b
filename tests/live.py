"""A cluster with its dashboard, job API and token, as `ray up` leaves one."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START = """
import pathlib, sys, ray
from orchestrator.backend.ray_cluster import HEALTH_CHECK
context = ray.init(
    address="local", num_cpus=int(sys.argv[4]), include_dashboard=True, dashboard_host="127.0.0.1",
    dashboard_port=int(sys.argv[1]), object_store_memory=200 * 2**20, log_to_driver=False,
    _metrics_export_port=int(sys.argv[2]), _temp_dir=sys.argv[3],
    _system_config={**HEALTH_CHECK, "metrics_report_interval_ms": 1000},
)
address = context.address_info["gcs_address"]
# As `ray start` does: jobs look there for their cluster, and would take any other of this machine.
pathlib.Path(sys.argv[3], "ray_current_cluster").write_text(address)
print("up", address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class LiveCluster:
    """Where it listens, and the home directory that has its token."""

    url: str
    gcs_address: str
    metrics_port: int
    home: Path
    pid: int


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def live_cluster(home: Path, *, num_cpus: int = 2, token: str = "", **environment: str):
    """Start a cluster for the length of a block, and give a `LiveCluster`.

    Args:
        home: of its user; with a token it gets the file that holds it.
        num_cpus: that it says it has.
        token: that whoever talks to it must have; none where it is empty.
        environment: of all its processes, jobs included.
    """
    if token:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(token)
        (home / ".ray" / "auth_token").chmod(0o644)  # as Ray writes it
    dashboard, metrics = free_port(), free_port()
    env = {
        **os.environ,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token" if token else "disabled",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **environment,
    }
    folder = tempfile.mkdtemp(prefix="cc-")  # short: Ray makes sockets below it
    given = [str(dashboard), str(metrics), folder, str(num_cpus)]
    with subprocess.Popen(
        [sys.executable, "-c", START, *given],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        said = process.stdout.readline().split()
        assert said[:1] == ["up"], "the cluster did not start"
        try:
            yield LiveCluster(
                url=f"http://127.0.0.1:{dashboard}",
                gcs_address=said[1],
                metrics_port=metrics,
                home=home,
                pid=process.pid,
            )
        finally:
            process.stdin.close()  # it shuts its Ray down
            process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)
