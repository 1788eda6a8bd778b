"""A Ray on this machine: where its sockets go, and that whatever fails is said, with a way out."""

import json
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from orchestrator.backend import local_start, ray_cluster
from orchestrator.backend.local_start import MAX_SOCKET_BYTES, SOCKETS, socket_place
from orchestrator.lint import machine
from tests.bad_input.warm import command_line

RUN = ["run", "tiny", "--method", "modegpt", "--out", "run", "--yes", "--json"]


@pytest.fixture
def long_folder(tmp_path):
    folder = tmp_path / ("a" * 60) / ("b" * 40)
    folder.mkdir(parents=True)
    return folder


def refused(folder, *words, **environment):
    """Return what a run says that does not find or start its Ray."""
    done = command_line([*RUN, *words], folder=folder, environment=environment)
    assert done.exit_code == 4, done.stderr
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["class"] == "ClusterError"
    assert error["hint"]
    return f"{error['message']}; {error['hint']}"


def test_the_directory_that_tmpdir_names_is_used_where_sockets_fit(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert socket_place() == local_start.SocketPlace(folder="/tmp")
    with local_start.sockets() as folder:
        assert folder is None


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_was_started_ahead_is_used_unless_the_plan_needs_more_memory():
    how = {"num_cpus": 1, "num_gpus": 0}
    with ray_cluster.started_ahead(num_cpus=1, dashboard=False) as ahead:
        first = node_of_this_process()
        with ray_cluster.connected("local", **how, store_bytes=1, ahead=ahead) as facts:
            assert (facts.cpus, node_of_this_process()) == (1.0, first)
        assert node_of_this_process() == first  # it outlives the run: the report is printed first
        more = ray_cluster.STORE_BYTES + 2**20
        with ray_cluster.connected("local", **how, store_bytes=more, ahead=ahead):
            assert node_of_this_process() != first
    assert not ray.is_initialized()


def node_of_this_process():
    return ray.get_runtime_context().get_node_id()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_directory_gets_a_short_one_of_this_user_alone_for_the_sockets(
    long_folder, monkeypatch, name
):
    monkeypatch.setenv(name, str(long_folder))
    with local_start.sockets() as folder:
        where = Path(folder).parent
        assert stat.S_IMODE(where.stat().st_mode) == 0o700
        longest = folder + SOCKETS
        assert len(longest) <= MAX_SOCKET_BYTES
        Path(longest).parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(longest)  # the kernel's own opinion
    assert not where.exists()
    (check,) = [c for c in machine.examine("runs", offline=True) if c.name == "Ray's sockets"]
    assert check.level == "note"
    assert f"{name} is {long_folder}: " in check.fix
    assert "too long" in check.fix


def test_a_directory_that_takes_no_file_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "x", Path("/proc/nowhere")):
        monkeypatch.setenv("TMPDIR", str(wrong))
        assert socket_place().folder in local_start.SHORT
        assert str(wrong) in socket_place().why


@pytest.mark.ray
@pytest.mark.nightly
def test_a_start_that_takes_too_long_is_tried_twice_and_leaves_no_process(tmp_path):
    said = refused(tmp_path, RAY_gcs_server_port_wait_time_s="0", RAY_TMPDIR="/tmp")
    assert "tried twice: Timed out" in said
    assert "try again later" in said


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["auto"], {"RAY_ADDRESS": "nonsense"}, "RAY_ADDRESS is nonsense"),
        (["auto"], {"RAY_ADDRESS": "http://127.0.0.1:1"}, "is a URL"),
        (["ray://127.0.0.1:1"], {}, "is a URL; an address is HOST:PORT"),
        (["nonsense"], {}, "Invalid address format"),
        # What is given on the command line comes before the environment.
        (["127.0.0.1:1"], {"RAY_ADDRESS": "nonsense"}, "nothing listens at 127.0.0.1:1"),
    ],
    ids=str,
)
def test_what_ray_refuses_is_said_with_a_way_out(tmp_path, words, environment, expected):
    assert expected in refused(tmp_path, "--address", *words, "--device", "cpu", **environment)


def test_a_cluster_that_cannot_be_asked_for_its_devices_is_named(tmp_path):
    said = refused(tmp_path, "--address", "127.0.0.1:1", "--dry-run")
    assert "nothing listens" in said
    assert "with --device cpu or cuda a plan needs no cluster" in said


@pytest.mark.ray
@pytest.mark.nightly
def test_a_start_that_was_only_slow_succeeds_the_second_time(tmp_path):
    stopped = []

    def stop_the_first():
        while not stopped:
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name() == "gcs_server":
                        process.suspend()
                        stopped.append(process)
                        return
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.001)

    watching = threading.Thread(target=stop_the_first, daemon=True)
    watching.start()
    done = command_line(
        RUN,
        folder=tmp_path,
        environment={"RAY_gcs_server_port_wait_time_s": "20"},
        seconds=300,
    )
    assert done.exit_code == 0, done.stderr
    assert stopped
    assert not stopped[0].is_running()


@pytest.mark.ray
@pytest.mark.nightly
def test_a_process_of_ray_that_ends_as_it_starts_is_named(tmp_path):
    def end_it():
        for _ in range(100_000):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name() == "gcs_server":
                        os.kill(process.pid, signal.SIGKILL)
                        return
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.001)

    threading.Thread(target=end_it, daemon=True).start()
    assert "gcs_server ended" in refused(tmp_path, RAY_gcs_server_port_wait_time_s="5")


@pytest.mark.ray
@pytest.mark.nightly
def test_a_run_goes_through_below_a_long_tmpdir_and_leaves_nothing_elsewhere(long_folder, tmp_path):
    before = set(Path("/tmp").glob("cc-*"))
    done = command_line(RUN, folder=tmp_path, environment={"TMPDIR": str(long_folder)}, seconds=300)
    assert done.exit_code == 0, done.stderr
    assert set(Path("/tmp").glob("cc-*")) <= before


class EndedNode:
    """A node whose raylet has ended, with what its log says last."""

    def __init__(self, folder, words):
        self._folder = folder
        (folder / "raylet.err").write_text(f"[2026-01-01 00:00:00,000 C 1 1] {words}\n")

    def dead_processes(self):
        return [("raylet", None)]

    def get_logs_dir_path(self):
        return str(self._folder)


@pytest.mark.parametrize(
    ("words", "slow"),
    [("Check failed: Timed out waiting for file /tmp/ray/port", True),
     ("Check failed: cannot allocate the store", False)],
)  # fmt: skip
def test_a_raylet_that_ended_because_it_waited_too_long_was_slow(tmp_path, words, slow):
    error, node = RuntimeError("The current node has not been updated"), EndedNode(tmp_path, words)
    assert local_start.was_slow(error, node) is slow
    busy = "the machine is busy" in local_start.refusal_of_start(error, node).hint
    assert busy is slow
