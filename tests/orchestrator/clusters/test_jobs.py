"""What can be known of a job without a cluster: addresses, retries, capacity."""

import json
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata

import pytest

from orchestrator.backend.capacity import awaited, max_resources
from orchestrator.cli.main import main
from orchestrator.remote import job_client, restart_driver
from orchestrator.remote.job_client import JobClient
from planners.errors import ClusterError, ConfigError


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """Return a function that keeps a command alive and gives its code and number of tries."""
    monkeypatch.setattr(restart_driver, "PAUSE_SECONDS", 0.01)

    def tried(ending, tries=3):
        log, said = tmp_path / "log", []
        program = f"import os, signal, sys; open({str(log)!r}, 'a').write('x'); {ending}"
        command = [sys.executable, "-c", program]
        code = restart_driver.keep_alive(command, tries=tries, say=said.append)
        assert len(said) == len(log.read_text()) - 1
        return code, len(log.read_text())

    return tried


@pytest.mark.parametrize("code", [0, 2, 3, 5, 130])
def test_a_driver_that_is_done_or_was_given_wrong_input_is_not_tried_again(attempts, code):
    assert attempts(f"sys.exit({code})") == (code, 1)


@pytest.mark.parametrize("code", [1, 4, 6])
def test_what_another_try_may_cure_is_tried_so_often_and_no_more(attempts, code):
    assert attempts(f"sys.exit({code})") == (code, 3)


def test_a_driver_that_was_killed_is_tried_again(attempts):
    ending = "os.kill(os.getpid(), signal.SIGKILL)"
    assert attempts(ending, tries=2) == (128 + signal.SIGKILL, 2)


def test_a_driver_that_was_told_to_stop_is_not_tried_again(attempts):
    ending = "os.kill(os.getpid(), signal.SIGTERM)"
    assert attempts(ending) == (128 + signal.SIGTERM, 1)


def test_a_cluster_that_grows_has_what_its_file_says_and_no_more_machines_than_its_limit():
    file = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}},
            "big": {"resources": {"CPU": 16, "GPU": 4}, "max_workers": 1},
            "small": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 8},
        },
    }
    assert max_resources(file, "GPU") == 4 + 1 + 1
    assert max_resources(file, "CPU") == 16 + 8 + 8
    assert max_resources({}, "GPU") == 0


def test_machines_of_ones_own_are_awaited_until_all_have_come():
    file = {"provider": {"type": "local", "head_ip": "a", "worker_ips": ["b", "c"]}}
    assert [awaited(file, nodes) for nodes in (1, 2, 3, 4)] == [2, 1, 0, 0]
    assert awaited({"provider": {"type": "aws"}}, 1) == 0
    assert awaited({"provider": {"type": "local", "head_ip": "a", "worker_ips": []}}, 1) == 0
    assert awaited({}, 1) == 0


def test_no_cluster_is_said_at_once():
    with socket.socket() as held:  # bound and not listening
        held.bind(("127.0.0.1", 0))
        begun = time.monotonic()
        with pytest.raises(ClusterError, match="no cluster at"):
            JobClient(f"http://127.0.0.1:{held.getsockname()[1]}").ray_version()
    assert time.monotonic() - begun < 5


def test_a_job_is_not_sent_over_the_network_to_a_cluster_that_lets_everybody_in(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no token is set"):
        JobClient("http://198.51.100.1:8265")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    JobClient("http://198.51.100.1:8265")  # names it; nothing is sent


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1:8265", "http://u:p@h:1"])
def test_what_is_no_dashboard_is_refused(address):
    with pytest.raises(ConfigError, match="--to"):
        JobClient(address)


class _YoungCluster(BaseHTTPRequestHandler):
    """Answers as a head does whose nodes have not registered yet, and later as one that is well."""

    refusals = 2

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        young = type(self).refusals > 0
        type(self).refusals -= 1
        self.send_response(500 if young else 200)
        self.end_headers()
        said = "No available agent to submit job, please try again later." if young else "{}"
        self.wfile.write(said.encode())

    def log_message(self, *args):
        """Say nothing."""


def test_a_cluster_that_has_only_just_come_up_gets_the_job_a_little_later():
    with ThreadingHTTPServer(("127.0.0.1", 0), _YoungCluster) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = JobClient(f"http://127.0.0.1:{server.server_port}")
        client.submit("true", submission_id="one", env={}, metadata={}, say=[].append)
        server.shutdown()
    assert _YoungCluster.refusals == -1


class _NoAgent(BaseHTTPRequestHandler):
    """Answers as a head does that is up and whose job agent is not; its version is ours."""

    said = b"No available agent to submit job, please try again later."

    def do_GET(self):
        version = json.dumps({"ray_version": metadata.version("ray")}).encode()
        self._answer(200 if self.path == "/api/version" else 404, version)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(500, self.said)

    def _answer(self, code, said):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def no_agent(monkeypatch):
    """Serve as such a head, for a client that is patient for half a second; give its URL."""
    monkeypatch.setattr(job_client, "AGENT_SECONDS", 0.5)
    monkeypatch.setattr(job_client, "QUIET_SECONDS", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoAgent) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_head_without_a_job_agent_is_waited_for_aloud_and_then_named(no_agent, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["submit", "tiny", "--to", no_agent, "--out", str(tmp_path / "run"), "--json"])
    assert refused.value.code == 4
    said = capsys.readouterr()
    assert said.err.startswith("waiting for the job agent of the head node at ")
    error = json.loads(said.out)["error"]
    assert error["class"] == "ClusterError"
    assert "the job agent of its head node did not answer" in error["message"]
    for way_out in ("ray status", "dashboard_agent.log", "ray stop"):
        assert way_out in error["hint"]
    assert not (tmp_path / "run" / "job.json").exists()


def test_a_traceback_of_the_head_is_told_without_the_names_of_its_classes(no_agent, monkeypatch):
    said = b"Traceback (most recent call last):\n  File ...\naiohttp.X: Cannot connect to host"
    monkeypatch.setattr(_NoAgent, "said", said)
    with pytest.raises(ClusterError, match="answered 500: Cannot connect to host") as refused:
        JobClient(no_agent).stop("one")
    assert "dashboard_agent.log" in refused.value.hint


def test_a_job_that_the_cluster_does_not_know_is_an_error_of_the_public_tree(
    no_agent, tmp_path, capsys
):
    job = {"address": no_agent, "submission_id": "one", "submitted": 0, "tries": 1, "version": "1"}
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(SystemExit) as refused:
        main(["logs", str(tmp_path)])
    assert refused.value.code == 4
    assert capsys.readouterr().err.startswith("ClusterError: ")
