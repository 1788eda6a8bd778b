"""The whole way: ``ray up`` by ssh, a run as a job, READY, ``ray down``; as a user types it.

The machine is this one, in a namespace of its own: its own processes, network, /tmp/ray, /dev/shm
and home, so that ``ray stop`` ends nothing else.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("ray_up.sh")
NEEDED = ("unshare", "sshd", "ssh", "ssh-keygen", "rsync", "mount", "ip")
LIMIT_SECONDS = 180


def missing():
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    lacking = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "needs root"
    probe = ["unshare", "-p", "-f", "-m", "--mount-proc", "-n", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "may not make a namespace"
    return ""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_comes_up_by_ssh_does_a_run_as_a_job_and_goes_down(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/sbin:{os.environ['PATH']}",
        "HOME": str(home),
        "PYTHON_BIN": str(Path(sys.executable).parent),
        "ROOT": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "LANG": "C.UTF-8",
    }
    begun = time.monotonic()
    done = subprocess.run(
        ["unshare", "-p", "-f", "-m", "--mount-proc", "-n", "--kill-child", "bash", str(SCRIPT)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS,
    )  # fmt: skip
    took = time.monotonic() - begun
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["verdict"] == "READY"
    assert status["job"]["state"] == "SUCCEEDED"
    assert "No nodes remaining" in said
    print(said[-1500:], f"\ntook {took:.0f} s")
