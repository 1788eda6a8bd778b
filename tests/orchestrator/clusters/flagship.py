"""What test_flagship.py does in its namespace, as a user would: from empty machines to READY.

This process is on the laptop. The Hub and the bucket are beside it, and on a bridge there are three
machines, each with processes, network, home, /tmp/ray and /dev/shm of its own.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from actors.storage.files import Directory
from orchestrator.remote.job_client import JobClient
from tests.builders import save_model
from tests.hub import REPO, FakeHub, wikitext_file
from tests.stores import KEYS, new_bucket, s3_server, uri_of

ROOT = Path(__file__).resolve().parents[3]
HERE = Path.cwd()
LAPTOP, HEAD, WORKERS = "10.77.0.1", "10.77.0.11", ("10.77.0.12", "10.77.0.13")
DASHBOARD = "http://127.0.0.1:8265"
TOKEN = "hf_planted0123456789abcdefghijklmnopqr"
BEGUN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGUN:4.0f} s  {text}", flush=True)


def do(*words, code=0, **options):
    done = subprocess.run(words, capture_output=True, text=True, **options)
    said = done.stdout + done.stderr
    assert done.returncode == code, f"{' '.join(words)}: {done.returncode}\n{said}"
    return said


def machine(stack, address):
    """Start a machine that has nothing but a Python with libraries, and lets its user in by key."""
    folder = HERE / address
    home = folder / "home"
    home.mkdir(parents=True)
    (folder / "ray").mkdir()
    do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    settings = {
        "HostKey": folder / "host_key", "ListenAddress": address, "StrictModes": "no",
        "AuthorizedKeysFile": Path.home() / ".ssh/id_ed25519.pub", "UsePAM": "no",
        "PidFile": "none",
    }  # fmt: skip
    (folder / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
    own = {
        "HF_ENDPOINT": os.environ["HF_ENDPOINT"], "OMP_NUM_THREADS": 1,
        "HF_HUB_DISABLE_PROGRESS_BARS": 1, **KEYS,
    }  # fmt: skip
    lines = "".join(f"export {name}={value}\n" for name, value in own.items())
    (home / ".bashrc").write_text(lines)
    script = Path(__file__).with_name("machine.sh")
    plain = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    unshared = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child"]
    borrowed = [sys.base_prefix, sys.prefix, str(libraries())]
    started = [*unshared, "bash", str(script), str(folder), address, *borrowed]
    process = stack.enter_context(subprocess.Popen(started, env=plain))
    stack.callback(process.kill)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().split():
        time.sleep(0.05)
    inside, name = children.read_text().split()[0], f"v{address.rpartition('.')[2]}"
    do("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
    do("ip", "link", "set", name, "master", "br0", "up")
    do("ip", "link", "set", f"{name}p", "netns", inside, "name", "eth0")


def libraries():
    """Return the folder that holds what pip would bring."""
    return next(
        Path(p) for p in sys.path if p.endswith("site-packages") and Path(p, "ray").is_dir()
    )


def cluster_file():
    """Write examples/clusters/on-prem.yaml with these machines, whose libraries are this one's."""
    file = yaml.safe_load((ROOT / "examples/clusters/on-prem.yaml").read_text())
    file["provider"] |= {"head_ip": HEAD, "worker_ips": list(WORKERS)}
    file["auth"] = {"ssh_user": "root", "ssh_private_key": str(Path.home() / ".ssh/id_ed25519")}
    file["file_mounts"] = {
        "~/compress-cluster/dist": str(HERE / "dist"),
        "~/.ray/auth_token": str(Path.home() / ".ray/auth_token"),
    }
    # No index here: what pip would bring but for our wheel is borrowed from this Python.
    ray = libraries().parents[2] / "bin" / "ray"
    borrow = (
        f"{sys.executable} -m venv --system-site-packages ~/venv && "
        f"echo {libraries()} > $(echo ~/venv/lib/python3*/site-packages)/borrowed.pth && "
        f'sed 1d {ray} | sed "1i #!$HOME/venv/bin/python" > ~/venv/bin/ray && '
        "chmod +x ~/venv/bin/ray"
    )
    setup = file["setup_commands"]
    assert "python3.12 -m venv" in setup[1]
    assert "constraints.txt ~/compress-cluster/dist/*.whl" in setup[2]
    setup[1] = f"test -x ~/venv/bin/ray || ({borrow})"
    setup[2] = (
        "~/venv/bin/pip install -q --no-index --no-deps --force-reinstall "
        "~/compress-cluster/dist/*.whl"
    )
    # The head does no work, as in cluster.yaml, and each worker has room for one.
    for key, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        *before, last = file[key]
        file[key] = [*before, f"{last} --num-cpus={cpus}"]
    path = HERE / "cluster.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    return str(path)


def texts():
    lines = [line + "\n" for path in sorted(Path(shutil.__file__).parent.glob("[a-d]*.py"))
             for line in path.read_text(errors="replace").splitlines()]  # fmt: skip
    return wikitext_file(lines[:4000])


def what_the_cluster_says():
    """Return all that whoever has the cluster's token is told of jobs, actors and tasks."""
    client = JobClient(DASHBOARD)
    paths = ["/api/jobs/", "/nodes?view=summary", "/logical/actors"]
    paths += [f"/api/v0/{kind}?detail=1&limit=1000" for kind in ("actors", "tasks", "workers")]
    return "".join(client._send("GET", path, seconds=60).decode() for path in paths)


def token_in(folder):
    """Return the files below a folder that hold the token."""
    token = TOKEN.encode()
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return [str(p) for p in files if token in p.read_bytes()]


def main():
    do("ip", "link", "set", "lo", "up")
    do("ip", "link", "add", "br0", "type", "bridge")
    do("ip", "addr", "add", f"{LAPTOP}/24", "dev", "br0")
    do("ip", "link", "set", "br0", "up")
    (HERE / "pattern").write_text(TOKEN + "\n")
    do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(Path.home() / ".ssh/id_ed25519"))
    do("ray", "get-auth-token", "--generate")
    do(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
       "-w", str(HERE / "dist"), str(HERE / "source"))  # fmt: skip
    model = save_model(
        HERE / "model", vocab_size=512, num_hidden_layers=4, hidden_size=512,
        intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=128, max_shard_size="12MB",
    )  # fmt: skip
    shutil.rmtree(model / "tokens")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "actors/models/tiny" / name, model / name)
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(FakeHub(model, token=TOKEN, host=LAPTOP))
        hub.wikitext |= {"train": texts(), "test": texts()}
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", **KEYS}
        port = stack.enter_context(s3_server(LAPTOP))
        for address in (HEAD, *WORKERS):
            machine(stack, address)
        out = uri_of(port, f"{new_bucket(port, LAPTOP)}/run", LAPTOP)
        go(stack, hub, out)


def go(stack, hub, out):
    file = cluster_file()
    say("ray up")
    (HERE / "up.txt").write_text(do("ray", "up", "-y", "--no-config-cache", file))
    say("the head is up")
    tunnel = subprocess.Popen(
        ["ray", "dashboard", file, "-p", "8265"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    stack.callback(tunnel.wait)
    stack.callback(lambda: os.killpg(tunnel.pid, 15))
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(Exception):
            JobClient(DASHBOARD).ray_version()
            break
        assert time.monotonic() < deadline, "no tunnel"
        time.sleep(0.3)
    asked = [
        "compress-cluster", "submit", REPO, "-r", "spot-70b", "--device", "cpu", "--workers", "2",
        "--calibration-sequences", "4", "--evaluation-sequences", "4", "--sequence-length", "64",
        "--microbatch-tokens", "128", "--out", out,
    ]  # fmt: skip
    say("submit without a token")
    refused = do(*asked, code=3)
    assert "access is restricted to users who were granted it" in refused, refused
    assert "hf auth login" in refused, refused
    login = Path.home() / ".cache/huggingface/token"
    login.parent.mkdir(parents=True, exist_ok=True)
    login.write_text(TOKEN)
    say("submit")
    do(*asked)
    said = what_the_cluster_says()
    log = do("compress-cluster", "logs", out, "--follow")
    (HERE / "log.txt").write_text(log)
    say("the job has ended")
    said += what_the_cluster_says()
    status = json.loads(do("compress-cluster", "status", out, "--json"))
    run = Directory(out)
    assert run.size("READY"), log
    stored = b"".join(run.read(name) for name in run.names())
    login.unlink()
    found = {
        "verdict": status["verdict"],
        "job": status["job"]["state"],
        "planned": json.loads(run.read("plan.json"))["forecast"]["download_bytes"],
        "served": [[s.client, s.name, s.start, s.size] for s in hub.served],
        "token": {
            "said": TOKEN in said + log + json.dumps(status),
            "bucket": TOKEN.encode() in stored,
            "files": [f for each in (HERE, Path("/tmp/ray")) for f in token_in(each)],
            "shown": [p.read_text() for p in HERE.glob("*/shown.txt")],
        },
    }
    (HERE / "found.json").write_text(json.dumps(found))
    say("ray down")
    do("ray", "down", "-y", file)
    say("done")


if __name__ == "__main__":
    main()
