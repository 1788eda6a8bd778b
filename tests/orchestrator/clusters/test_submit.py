"""Runs as jobs, on a live cluster with its token: sent, found, followed, killed, cancelled."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.cli.main import main
from orchestrator.remote import submission
from orchestrator.remote.job_client import JobClient
from orchestrator.rundir import lease
from planners.errors import ClusterError
from tests.builders import LENGTH, save_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SECONDS = 120
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture
def at_home(live_cluster, monkeypatch):
    """Be a user who has the cluster's token."""
    monkeypatch.setenv("HOME", str(live_cluster.home))
    return live_cluster


def options_of(model, out, cluster):
    """Name no device: the head asks its cluster, whose workers have no GPU."""
    tokens = f"tokens:{model}/tokens"
    return [
        str(model), "--out", str(out), "--to", cluster.url, "--slice", "0.25",
        "--calibration", f"{tokens}/calibration.safetensors",
        "--evaluation", f"{tokens}/evaluation.safetensors",
        "--microbatch-tokens", str(LENGTH),
    ]  # fmt: skip


def wait_for(condition, what):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {what} within {SECONDS} s")


def test_a_driver_that_is_killed_is_started_again_and_the_run_is_found_by_its_directory(
    model, at_home, tmp_path, capsys
):
    out = tmp_path / "run"
    main(["submit", *options_of(model, out, at_home), "--keep-alive", "1", "--price", "2.5"])
    assert "keeps running after this terminal closes" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["submit", *options_of(model, out, at_home)])
    assert refused.value.code == 2
    assert "is already running" in capsys.readouterr().err

    run = Directory(str(out))
    holder = wait_for(lambda: read_records(run) and lease.holder(run), "record")
    os.kill(holder["pid"], signal.SIGKILL)
    main(["logs", str(out), "--follow"])
    said = capsys.readouterr().out
    assert "the driver was killed by SIGKILL; attempt 2 of 2 starts" in said
    assert (out / "READY").exists()
    assert json.loads((out / "plan.json").read_text())["forecast"]["price_per_hour"] == 2.5
    second = read_records(run)
    assert len(second) > 10

    main(["status", str(out), "--json"])
    status = json.loads(capsys.readouterr().out)
    assert status["verdict"] == "READY"
    assert status["job"]["state"] == "SUCCEEDED"
    note = (out / "job.json").read_text()
    assert (at_home.home / ".ray" / "auth_token").read_text() not in note


@pytest.mark.nightly
def test_every_name_of_the_grafana_dashboard_is_on_the_metrics_page_of_a_run(
    model, at_home, tmp_path
):
    panels = json.loads((ROOT / "docs" / "grafana.json").read_text())["panels"]
    text = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    names = set(re.findall(r"ray_compress_\w+", text))
    names -= {"ray_compress_training_loss"}  # this run trains nothing
    assert len(names) > 4
    given = options_of(model, tmp_path / "run", at_home)
    main(["submit", *given])
    url = f"http://127.0.0.1:{at_home.metrics_port}/metrics"

    def all_there():
        with urllib.request.urlopen(url, timeout=10) as page:
            scraped = page.read().decode()
        return names <= set(re.findall(r"^(ray_compress_\w+)\{", scraped, re.MULTILINE))

    wait_for(all_there, "page with all names")
    wait_for((tmp_path / "run" / "READY").exists, "READY")


@pytest.mark.nightly
def test_a_job_is_cancelled_by_its_run_and_its_driver_ends(model, at_home, tmp_path, capsys):
    out = tmp_path / "run"
    main(["submit", *options_of(model, out, at_home), "--keep-alive", "5"])
    run = Directory(str(out))
    holder = wait_for(lambda: lease.holder(run), "driver")
    main(["cancel", str(out)])
    assert "finished work is kept" in capsys.readouterr().out
    wait_for(lambda: not psutil.pid_exists(holder["pid"]), "end of the driver")
    job = submission.required_job(run)
    wait_for(lambda: submission.state(job) in ("STOPPED", "FAILED"), "end of the job")
    assert not (out / "READY").exists()


def test_a_run_on_gpus_that_are_not_there_is_refused_with_both_numbers(model, at_home, tmp_path):
    given = options_of(model, tmp_path / "run", at_home)
    given[given.index("--to") : given.index("--to") + 2] = ["--address", at_home.gcs_address]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", *given, "--device", "cuda"],
        env={**os.environ, "RAY_AUTH_MODE": "token"}, cwd=ROOT,
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == ClusterError.exit_code
    assert "0 GPUs; this run needs 1 and 1" in done.stderr
    assert "--device cpu" in done.stderr


def test_a_missing_or_wrong_token_is_told_apart(live_cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match="the token is missing"):
        JobClient(live_cluster.url).ray_version()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with pytest.raises(ClusterError, match="the token is not this cluster's"):
        JobClient(live_cluster.url).ray_version()


def test_the_token_file_is_its_owners_alone_once_it_was_used(at_home):
    assert JobClient(at_home.url).ray_version()
    assert (at_home.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_a_client_of_another_version_of_ray_is_refused(at_home, monkeypatch, model, tmp_path):
    real = submission.metadata.version
    monkeypatch.setattr(
        submission.metadata, "version", lambda name: "2.9.0" if name == "ray" else real(name)
    )
    with pytest.raises(SystemExit) as refused:
        main(["submit", *options_of(model, tmp_path / "run", at_home)])
    assert refused.value.code == 4
    assert not (tmp_path / "run").exists()


def test_dashboard_and_job_api_listen_on_this_machine_alone(live_cluster):
    port = int(live_cluster.url.rpartition(":")[2])
    listening = [
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]


def test_nobody_gets_anything_out_of_the_job_api_without_the_token(live_cluster):
    for path in ("/api/version", "/api/jobs/", "/nodes"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(live_cluster.url + path, timeout=5)
        with refused.value as answer:
            assert answer.code == 401
