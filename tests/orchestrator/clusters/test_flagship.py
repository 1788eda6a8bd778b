"""The path of the README for a large model: empty machines, a gated model on the Hub, a bucket."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import PIECE_BYTES
from tests.orchestrator.clusters.test_ray_up import missing

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("flagship.py")
HEAD, WORKERS = "10.77.0.11", ("10.77.0.12", "10.77.0.13")
LIMIT_SECONDS = 240
PACKED = ("actors", "orchestrator", "planners", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
def test_from_empty_machines_to_ready_with_a_gated_model_of_the_hub(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    (tmp_path / "laptop" / ".ssh").mkdir(parents=True)
    (tmp_path / "source").mkdir()
    for name in PACKED:  # a wheel is built where its source lies
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / "source" / name)
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/sbin:{os.environ['PATH']}",
        "HOME": str(tmp_path / "laptop"),
        "PYTHONPATH": str(ROOT),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    begun = time.monotonic()
    done = subprocess.run(
        ["unshare", "-p", "-f", "-m", "--mount-proc", "-n", "--kill-child", sys.executable,
         str(SCRIPT)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=4 * LIMIT_SECONDS,
    )  # fmt: skip
    print(done.stdout[-2000:], f"\ntook {time.monotonic() - begun:.0f} s")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["verdict"], found["job"]) == ("READY", "SUCCEEDED")
    # The pattern that was looked for is the only file that holds the token.
    assert found["token"] == {
        "said": False, "bucket": False, "files": [str(tmp_path / "pattern")], "shown": [""] * 3
    }  # fmt: skip
    check_reads(Checkpoint(str(tmp_path / "model")), found)


def check_reads(checkpoint, found):
    """See that each worker read the tensors that it needed and nothing around them."""
    tensors = {(p.file, p.entry.start, p.entry.size): n for n, p in checkpoint.locations.items()}
    sizes = {f: checkpoint.directory.size(f) for f, _, _ in tensors}
    times, by_worker = dict.fromkeys(tensors.values(), 0), dict.fromkeys(WORKERS, 0)
    total = 0
    for client, name, start, size in found["served"]:
        if client not in WORKERS or name not in sizes or start == 8 or size == 8:
            continue
        total += size
        whole = start % PIECE_BYTES == 0 and size == min(PIECE_BYTES, sizes[name] - start)
        if not whole:  # what is timed at the end is loaded as its users load it
            times[tensors[name, start, size]] += 1
            by_worker[client] += size
    layers = {n: c for n, c in times.items() if ".layers." in n and "norm" not in n}
    least = min(layers.values())
    assert least >= 3  # calibrated, evaluated, compressed
    # A worker may have read a layer ahead that another one then compressed.
    assert max(layers.values()) <= least + 1, layers
    assert max(by_worker.values()) < 0.8 * sum(by_worker.values())
    assert found["planned"] == pytest.approx(total, rel=0.1)
    head = sum(s for c, n, _, s in found["served"] if c == HEAD and n in sizes)
    assert head < 1.2 * checkpoint.total_bytes  # the door looks at all of a small model, once
