"""What can be known of a job without a cluster: addresses, retries, capacity."""

import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator import submission
from orchestrator.clusters.capacity import most
from orchestrator.jobs import JobClient
from planners.errors import ClusterError, ConfigError


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """Return a function that keeps a command alive and gives its code and number of tries."""
    monkeypatch.setattr(submission, "PAUSE_SECONDS", 0.01)

    def tried(ending, tries=3):
        log, said = tmp_path / "log", []
        program = f"import os, signal, sys; open({str(log)!r}, 'a').write('x'); {ending}"
        code = submission.keep_alive([sys.executable, "-c", program], tries=tries, say=said.append)
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
    assert most(file, "GPU") == 4 + 1 + 1
    assert most(file, "CPU") == 16 + 8 + 8
    assert most({}, "GPU") == 0


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
    with pytest.raises(ConfigError, match="there is no token"):
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
        client.submit("true", submission_id="one", env={}, metadata={})
        server.shutdown()
    assert _YoungCluster.refusals == -1
