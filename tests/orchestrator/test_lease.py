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
from actors.storage.records import read_records
from orchestrator.backend.local import LocalExecutor
from orchestrator.phases.open_run import open_run
from orchestrator.run import run, run_on
from orchestrator.rundir import lease
from planners.errors import StorageError
from tests.builders import prepared_run, save_model

HOLDER = """
import sys, time
from actors.storage.files import Directory
from orchestrator.rundir import lease
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


HOSTILE = [
    {"pid": "1; rm"}, {"pid": True}, {"pid": -1}, {"pid": 10**30}, {"beat": [1]}, {"beat": 0.5},
    {"since": "now"}, {"since": 1e300}, {"since": None}, {"host": 7}, {"host": "a\x1b[2J"},
    {"host": "x" * 300}, {"nonce": {}}, {"started": 4}, {"padding": "x" * 20_000},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda c: str(c)[:30])
def test_a_lease_that_no_driver_writes_holds_nobody_up(directory, changes):
    directory.write(lease.NAME, json.dumps({**lease_of(), **changes}).encode())
    assert lease.holder(directory) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b'{"pid": 1}', b"[" * 9000])
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


RACER = """
import sys, time
from actors.storage.files import Directory
from orchestrator.rundir import lease
from planners.errors import StorageError
directory = Directory(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.held(directory) as hold:
        print("held", flush=True)
        time.sleep(4)
        hold.require()
        print("still held", flush=True)
except StorageError as error:
    print(error.exit_code, error, flush=True)
"""


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_drivers_that_start_at_the_same_instant_exactly_one_goes_on(directory, s3, where):
    uri = directory.uri if where == "local" else s3("run")
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, uri],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(3)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0] for racer in racers]
    assert sum("still held" in each for each in said) == 1
    assert (
        sum("6 " in each and ("is held by" in each or "taken over" in each) for each in said) == 2
    )


def test_a_driver_that_lost_its_lease_records_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.0)
    prepared = prepared_run(save_model(tmp_path / "model"), tmp_path / "run")
    open_run(prepared)

    def take_over(event):
        if event["kind"] == "layer":
            theirs = lease_of(host="elsewhere")
            prepared.run.write(lease.NAME, json.dumps(theirs).encode())

    with (
        pytest.raises(StorageError, match=r"taken over by process .* on elsewhere") as caught,
        lease.held(prepared.run) as hold,
    ):
        run_on(prepared, LocalExecutor(), listener=take_over, fence=hold.require)
    assert caught.value.exit_code == 6
    layers = [unit for unit in read_records(prepared.run) if unit.startswith("layer-")]
    assert len(layers) == 1
    assert lease.holder(prepared.run)["host"] == "elsewhere"
