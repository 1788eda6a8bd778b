"""Notices of clouds, from a metadata service on loopback that says what theirs say."""

import contextlib
import http.server
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.backend.cloud_notices import NoAnswerError, Notice, aws_notice, gcp_notice, watch
from orchestrator.backend.node_agent import on_sigterm

TOKEN = "a-token"


class Metadata(http.server.BaseHTTPRequestHandler):
    """The part of both services that is asked; ``said`` is path -> what is answered.

    A list is used up, and then FALSE.
    """

    def do_PUT(self):
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self.answer(TOKEN if self.server.cloud == "aws" and asked else None)

    def do_GET(self):
        key = {"aws": ("X-aws-ec2-metadata-token", TOKEN), "gcp": ("Metadata-Flavor", "Google")}
        name, value = key[self.server.cloud]
        allowed = self.headers.get(name) == value
        self.answer(self.server.said.get(self.path) if allowed else None)

    def answer(self, text):
        if isinstance(text, list):
            text = text.pop() if text else "FALSE"
        self.send_response(200 if text is not None else 404)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def metadata(cloud, said):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.cloud, server.said = cloud, said
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", said
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"


def action(seconds):
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    return f'{{"action": "terminate", "time": "{at.strftime("%Y-%m-%dT%H:%M:%SZ")}"}}'


def test_a_machine_that_stays_has_no_notice():
    with metadata("aws", {}) as (base, _):
        assert aws_notice(base) is None
    with metadata("gcp", {PREEMPTED: "FALSE"}) as (base, _):
        assert gcp_notice(base) is None


def test_the_notice_of_ec2_says_how_long_is_left():
    with metadata("aws", {ACTION: action(100)}) as (base, _):
        notice = aws_notice(base)
    assert 95 < notice.seconds <= 100
    assert notice.source == "EC2 terminate"


def test_a_notice_that_cannot_be_read_is_a_notice():
    with metadata("aws", {ACTION: "<html>"}) as (base, _):
        assert aws_notice(base) == Notice(seconds=120, source="EC2")


def test_the_notice_of_compute_engine_is_half_a_minute():
    with metadata("gcp", {PREEMPTED: "TRUE"}) as (base, _):
        assert gcp_notice(base) == Notice(seconds=30, source="Compute Engine")


def test_the_other_cloud_does_not_answer():
    with metadata("gcp", {PREEMPTED: "FALSE"}) as (base, _), pytest.raises(NoAnswerError):
        aws_notice(base)
    with metadata("aws", {}) as (base, _), pytest.raises(NoAnswerError):
        gcp_notice(base)


@pytest.mark.parametrize(
    ("cloud", "path", "text"),
    [("aws", ACTION, action(60)), ("gcp", PREEMPTED, "TRUE")],
    ids=["aws", "gcp"],  # without the time, so that processes name the tests alike
)
def test_a_watch_ends_with_the_notice(cloud, path, text):
    told = []
    with metadata(cloud, {PREEMPTED: "FALSE"}) as (base, said):
        watching = threading.Thread(
            target=watch, args=(told.append,), kwargs={"base": base, "poll_seconds": 0.05}
        )
        watching.start()
        time.sleep(0.3)
        assert watching.is_alive()
        assert told == []
        said[path] = text
        watching.join(5)
    assert not watching.is_alive()
    assert len(told) == 1


def test_a_watch_ends_where_there_is_no_cloud():
    told = []
    watch(told.append, base="http://127.0.0.1:9", poll_seconds=0.01)
    assert told == []


def test_sigterm_is_a_notice_where_there_is_no_cloud_too():
    told = []
    with on_sigterm() as stopped:
        killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        killer.start()
        watch(told.append, base="http://127.0.0.1:9", poll_seconds=0.05, stopped=stopped)
        killer.join()
    assert [notice.source for notice in told] == ["SIGTERM"]
