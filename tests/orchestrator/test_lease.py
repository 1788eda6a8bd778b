"""One driver for one run directory."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from actors.storage.files import Directory
from orchestrator import lease
from orchestrator.run import run
from planners.errors import StorageError
from tests.builders import prepared_run, save_model

HOLDER = """
import sys, time
from actors.storage.files import Directory
from orchestrator import lease
with lease.held(Directory(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def directory(tmp_path):
    return Directory(str(tmp_path / "run"))


@pytest.fixture
def other_driver(directory):
    """Another process that holds the run."""
    command = [sys.executable, "-c", HOLDER, directory.uri]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_driver_is_refused_and_told_who_is_there(directory, other_driver):
    with pytest.raises(StorageError) as caught, lease.held(directory):
        pass
    assert f"process {other_driver.pid} on {socket.gethostname()}" in str(caught.value)


def test_a_run_does_not_start_beside_another(tmp_path, directory):
    model = save_model(tmp_path / "model")
    prepared = prepared_run(model, tmp_path / "run")
    with lease.held(directory), pytest.raises(StorageError, match=f"held by process {os.getpid()}"):
        run(prepared, listener=print)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_holder_that_was_killed_is_replaced_at_once(directory, other_driver):
    other_driver.kill()
    other_driver.wait()
    begun = time.monotonic()
    with lease.held(directory):
        assert lease.holder(directory)["pid"] == os.getpid()
    assert time.monotonic() - begun < lease.HEARTBEAT_SECONDS


def test_a_process_that_has_the_number_of_a_dead_holder_is_not_the_holder(directory):
    directory.write(lease.NAME, json.dumps({**lease_of(), "started": "1"}).encode())
    with lease.held(directory):
        assert lease.holder(directory)["nonce"] != "theirs"


def test_the_lease_is_given_back(directory):
    with lease.held(directory):
        assert lease.holder(directory)["pid"] == os.getpid()
    assert lease.holder(directory) is None
    with lease.held(directory):
        pass


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b'{"pid": 1}'])
def test_a_torn_lease_holds_nobody_up(directory, data):
    directory.write(lease.NAME, data)
    with lease.held(directory):
        assert lease.holder(directory)["pid"] == os.getpid()


def lease_of(**changes):
    return {"nonce": "theirs", "host": socket.gethostname(), "pid": os.getpid(), "beat": 0,
            "since": time.time(), "started": "", **changes}  # fmt: skip


@pytest.fixture
def short_expiry(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.6)


@pytest.mark.usefixtures("short_expiry")
def test_a_holder_on_another_host_is_replaced_when_its_heart_stands_still(directory):
    directory.write(lease.NAME, json.dumps(lease_of(host="elsewhere")).encode())
    begun = time.monotonic()
    with lease.held(directory):
        assert lease.holder(directory)["host"] == socket.gethostname()
    assert time.monotonic() - begun >= 0.6


@pytest.mark.usefixtures("short_expiry")
def test_a_holder_on_another_host_whose_heart_beats_is_left_alone(directory):
    stop = threading.Event()

    def beat():
        beats = 0
        while not stop.wait(0.05):
            beats += 1
            theirs = lease_of(host="elsewhere", beat=beats)
            directory.write(lease.NAME, json.dumps(theirs).encode())

    directory.write(lease.NAME, json.dumps(lease_of(host="elsewhere")).encode())
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StorageError, match="on elsewhere since"), lease.held(directory):
            pass
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("short_expiry")
def test_the_heart_of_a_holder_beats(directory):
    with lease.held(directory):
        first = lease.holder(directory)["beat"]
        deadline = time.monotonic() + 20
        while lease.holder(directory)["beat"] < first + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.usefixtures("short_expiry")
def test_a_driver_that_was_taken_for_dead_leaves_the_lease_to_its_successor(directory):
    successor = lease_of(host="elsewhere")
    with lease.held(directory):
        directory.write(lease.NAME, json.dumps(successor).encode())
        time.sleep(3 * lease.HEARTBEAT_SECONDS)
        assert lease.holder(directory) == successor
    assert lease.holder(directory) == successor
