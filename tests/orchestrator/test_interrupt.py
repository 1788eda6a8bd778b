"""Ctrl-C through the real command: once to stop when it is safe, twice to leave now."""

import os
import signal
import subprocess
import sys
import time

import pytest

from actors.storage.files import Directory
from actors.storage.records import read_records
from tests.builders import LENGTH, compress_local, result_files, save_model, save_tokens

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SEQUENCES = 500  # enough that a signal comes in the middle


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    save_tokens(folder / "tokens" / "calibration.safetensors", SEQUENCES)
    return folder


def command(model, out):
    return [
        sys.executable, "-c", "from orchestrator.cli.main import main; main()", "run", str(model),
        "--out", str(out),
        "--slice", "0.25", "--workers", "1", "--device", "cpu",
        "--microbatch-tokens", str(LENGTH),
        "--calibration", f"tokens:{model}/tokens/calibration.safetensors",
        "--evaluation", f"tokens:{model}/tokens/evaluation.safetensors",
    ]  # fmt: skip


def interrupt(model, out, *, times):
    """Start a run, press Ctrl-C in the middle of its calibration; return exit code and stderr."""
    log = out.parent / f"{out.name}.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command(model, out), stderr=stderr, stdout=subprocess.DEVNULL, start_new_session=True
        )
        wait_for(lambda: (out / "lease.json").exists() and has_begun(log), process)
        for _ in range(times):
            # As a terminal does: to every process of the group, Ray's own included.
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.05)
        code = process.wait(120)
    return code, log.read_text()


def has_begun(log):
    return "calibrate: " in log.read_text()  # a first line of progress


def wait_for(holds, process):
    deadline = time.monotonic() + 180
    while not holds():
        assert process.poll() is None, "the run was over before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_once_saves_what_is_under_way_and_says_how_to_go_on(model, tmp_path):
    code, said = interrupt(model, tmp_path / "run", times=1)
    assert code == 130
    assert "saving unfinished work first" in said
    assert "to resume: compress-cluster run" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "lease.json").exists()
    saved = read_records(Directory(str(tmp_path / "run")))["partial-layer-00000"].values["next"]
    assert 0 < saved < SEQUENCES
    events = []
    how = {"calibration": {"microbatch_tokens": LENGTH}}
    compress_local(model, tmp_path / "run", listener=events.append, **how)
    assert len([e for e in events if e["kind"] == "calibrate"]) == SEQUENCES - saved
    compress_local(model, tmp_path / "expected", **how)
    assert result_files(tmp_path / "run") == result_files(tmp_path / "expected")


def test_twice_leaves_at_once(model, tmp_path):
    code, said = interrupt(model, tmp_path / "run", times=2)
    assert code == 130
    assert "to resume: compress-cluster run" in said
    assert "Traceback" not in said
