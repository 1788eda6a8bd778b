"""One driver for one run directory."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from uuid import uuid4

import pytest

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.backend.local import LocalExecutor
from orchestrator.phases.open_run import open_run
from orchestrator.run import run, run_on
from orchestrator.rundir import lease
from planners.errors import StorageError
from tests.builders import prepared_run, save_model
from tests.stores import Fault

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
def test_of_two_that_wait_for_a_silent_holder_the_later_is_told_of_the_one_that_took_over(
    directory,
):
    directory.write(lease.NAME, json.dumps(lease_of(host="silent")).encode())
    theirs = json.dumps(lease_of(host="elsewhere", nonce="new")).encode()
    taken = threading.Timer(0.1, directory.write, (lease.NAME, theirs))
    taken.start()
    with pytest.raises(StorageError, match="on elsewhere since"), lease.held(directory):
        pass
    taken.join()


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


# Drives many runs at once, each from an instant of its own, and writes a line for each.
RACER = """
import json, sys, threading, time
from actors.storage.files import Directory
from orchestrator.rundir import lease
from planners.errors import StorageError

lease.LOOK_SECONDS = 0.0
all_have_tried = threading.Event()

def drive(directory, begin):
    time.sleep(max(begin - time.monotonic(), 0))
    try:
        with lease.held(directory) as hold:
            tell(directory, "holds")
            all_have_tried.wait()
            hold.require()
            tell(directory, "still holds")
    except StorageError as error:
        tell(directory, f"{error.exit_code} {error}")

def tell(directory, words):
    sys.stdout.write(json.dumps([directory.uri, words]) + "\\n")  # at once: threads write here
    sys.stdout.flush()

runs = [Directory(uri) for uri in sys.argv[1:]]
print("ready", flush=True)
begins = json.loads(sys.stdin.readline())
for each in zip(runs, begins):
    threading.Thread(target=drive, args=each).start()
sys.stdin.readline()
all_have_tried.set()
"""


@contextlib.contextmanager
def racers(uris, *, number):
    """Start processes that drive runs; each is ready when it is told the instants to begin at."""
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, "-c", RACER, *uris]
    with contextlib.ExitStack() as started:
        found = [started.enter_context(subprocess.Popen(command, **how)) for _ in range(number)]
        for racer in found:
            started.callback(racer.kill)
            assert racer.stdout.readline() == "ready\n"
        yield found


def require_one_holder_each(uris, processes, begins):
    """Let processes drive runs from the instants given for each; see who holds each run."""
    for racer, instants in zip(processes, begins, strict=True):
        print(json.dumps(instants), file=racer.stdin, flush=True)
    said = [dict(json.loads(racer.stdout.readline()) for _ in uris) for racer in processes]
    for racer in processes:
        print(file=racer.stdin, flush=True)
    after = [dict(map(json.loads, racer.stdout)) for racer in processes]
    for uri in uris:
        winners = [n for n, each in enumerate(said) if each[uri] == "holds"]
        assert len(winners) == 1, [each[uri] for each in said]
        (winner,) = winners
        assert after[winner][uri] == "still holds"
        who = f"process {processes[winner].pid} on {socket.gethostname()} since "
        others = [each[uri] for n, each in enumerate(said) if n != winner]
        assert all(other.startswith(f"6 {uri} is held by {who}") for other in others), others


@pytest.mark.parametrize(
    ("where", "drivers", "tries"),
    [
        ("local", 3, 8),
        ("s3", 3, 8),
        pytest.param("local", 2, 100, marks=pytest.mark.nightly),
        pytest.param("s3", 2, 100, marks=pytest.mark.nightly),
    ],
)
def test_of_drivers_that_race_exactly_one_holds_and_the_others_say_who(
    tmp_path, s3, where, drivers, tries
):
    uris = [str(tmp_path / str(n)) if where == "local" else s3(str(n)) for n in range(tries)]
    for uri in uris[::2]:  # here they race to take over from a dead driver
        Directory(uri).write(lease.NAME, json.dumps(lease_of()).encode())
    # From the same instant to so far apart that the later ones find a holder.
    apart = (0.01 if where == "local" else 0.1) / tries
    with racers(uris, number=drivers) as processes:
        now = time.monotonic() + 0.2
        begins = [
            [now + n * (0.05 + late * apart) for n in range(tries)] for late in range(drivers)
        ]
        require_one_holder_each(uris, processes, begins)


@pytest.mark.parametrize("after", [0, 1], ids=["word that it comes", "lease"])
def test_a_driver_that_is_slow_to_write_and_a_fast_one_do_not_both_hold(faulty, after):
    faulty.faults = [Fault("slow", "PUT", path=lease.NAME, after=after, times=1, seconds=3)]
    uri = faulty.uri("run")
    with racers([uri], number=2) as processes:
        now = time.monotonic()
        require_one_holder_each([uri], processes, [[now], [now + 1]])


@pytest.mark.usefixtures("short_expiry")
def test_a_driver_that_died_while_it_came_is_not_waited_for_long(directory):
    directory.write(f"{lease.NAME}.{uuid4().hex}", b"")
    with lease.held(directory):
        assert directory.names() == [lease.NAME]
    assert directory.names() == []


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
