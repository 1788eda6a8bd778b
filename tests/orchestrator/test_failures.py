"""Failures of each class: who tries again, who stops, and what is left to look at."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from actors.storage.files import Directory
from actors.storage.records import read_records
from actors.storage.tensors import read_tensors, write_tensors
from actors.worker.stage import Stage
from orchestrator.backend.executor import FailureClass, WorkerFailed, WorkerLost
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli.main import main
from planners.errors import ClusterError, CompressionError, NumericsError, StorageError
from tests.builders import compress_local, result_files, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


class FailingExecutor(LocalExecutor):
    """Fails the calls whose label is given, so many times, with a given error."""

    def __init__(self, label, error, *, times):
        self._label, self._error, self.left = label, error, times

    def call(self, handle, method, *args, num_returns=1, label):
        tickets = super().call(handle, method, *args, num_returns=num_returns, label=label)
        if re.fullmatch(self._label, label) and self.left:
            self.left -= 1
            (tickets if num_returns == 1 else tickets[0]).error = self._error
        return tickets


ONCE = [
    WorkerLost(FailureClass.WORKER_CRASHED, "gone"),
    WorkerLost(FailureClass.OUT_OF_MEMORY, "killed"),
    WorkerLost(FailureClass.STALLED, "silent"),
    StorageError("the store said 503"),
    NumericsError("not positive definite"),
]


@pytest.mark.parametrize("error", ONCE, ids=lambda e: f"{type(e).__name__}: {e}")
def test_what_happens_once_is_tried_on_another_worker(model, tmp_path, error):
    compress_local(model, tmp_path / "expected")
    executor = FailingExecutor("layer-00002", error, times=1)
    events = []
    compress_local(model, tmp_path / "run", executor=executor, workers=2, listener=events.append)
    assert executor.left == 0
    record = read_records(Directory(str(tmp_path / "run")))["layer-00002"]
    assert record.attempt == 2
    classes = [e["kind"] for e in events if e["kind"] in record.values["retried_after"]]
    assert len(classes) == len(record.values["retried_after"]) == 1
    assert result_files(tmp_path / "run") == result_files(tmp_path / "expected")
    assert not (tmp_path / "run" / "failures").exists()


@pytest.mark.parametrize("error", ONCE, ids=lambda e: f"{type(e).__name__}: {e}")
def test_what_happens_on_two_workers_stops_the_run_with_a_reproducer(model, tmp_path, error):
    executor = FailingExecutor("layer-00002", error, times=2)
    expected = type(error) if isinstance(error, CompressionError) else ClusterError
    with pytest.raises(expected) as caught:
        compress_local(model, tmp_path, executor=executor, workers=2)
    reproducer = tmp_path / "failures" / "layer-00002.json"
    assert str(reproducer) in caught.value.hint
    found = json.loads(reproducer.read_text())
    assert [i["unit"] for i in found["inputs"]] == [f"basis-site-0000{n}" for n in (4, 5, 6)]
    assert all(i["files"][0]["sha256"] for i in found["inputs"])
    assert found["versions"]["torch"]
    assert found["recipe"]["seed"] == 0
    compress_local(model, tmp_path)  # and the same command goes on


def test_a_single_worker_does_not_repeat_what_it_would_fail_again(model, tmp_path):
    executor = FailingExecutor("layer-00002", NumericsError("no"), times=5)
    with pytest.raises(NumericsError):
        compress_local(model, tmp_path, executor=executor, workers=1)
    assert executor.left == 4


def test_a_reproducer_does_the_unit_again_and_leaves_the_run_alone(model, tmp_path, capsys):
    executor = FailingExecutor("layer-00001", NumericsError("of that machine"), times=2)
    with pytest.raises(NumericsError):
        compress_local(model, tmp_path, executor=executor, workers=2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    main(["reproduce", str(tmp_path / "failures" / "layer-00001.json")])
    assert "the work did not fail here" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def spoil(run, name, key):
    """Put a NaN into a tensor of a file, whose size stays the same."""
    tensors = read_tensors(run, name)
    tensors[key].view(-1)[0] = float("nan")
    write_tensors(run, name, tensors)


def test_the_command_of_a_reproducer_fails_as_the_run_did(model, tmp_path):
    compress_local(model, tmp_path)
    for name in ("layer-00001", "basis-site-00002"):
        (tmp_path / "records" / f"{name}.json").unlink()
    spoil(Directory(str(tmp_path)), "stats/layer-00001.safetensors", "resid_attn.gram")
    with pytest.raises(CompressionError) as caught:
        compress_local(model, tmp_path, workers=2)
    (reproducer,) = (tmp_path / "failures").iterdir()
    found = json.loads(reproducer.read_text())
    assert found["reproduce"] in caught.value.hint
    command = [sys.executable, "-m", "orchestrator", *shlex.split(found["reproduce"])[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == caught.value.exit_code
    assert found["error"] in done.stderr
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("call", ["load", "mb 3"])
def test_a_stage_that_fails_the_same_way_twice_leaves_a_reproducer_of_the_pass(
    model, tmp_path, capsys, call
):
    label = "load.layers 2-3." if call == "load" else "calibrate.layers 2-3. mb 3"
    executor = FailingExecutor(label, WorkerLost(FailureClass.OUT_OF_MEMORY, "none left"), times=2)
    with pytest.raises(ClusterError, match="lost its worker 2 times") as caught:
        compress_local(model, tmp_path, executor=executor, workers=2)
    assert "--microbatch-tokens" in caught.value.hint
    (reproducer,) = (tmp_path / "failures").iterdir()
    assert reproducer.name.startswith("calibrate-layers-2-3-")
    main(["reproduce", str(reproducer)])
    assert "the work did not fail here" in capsys.readouterr().out


def test_a_reproducer_of_a_stage_in_the_middle_does_all_of_its_last_layer(
    model, tmp_path, monkeypatch
):
    label = "calibrate.layers 0-1. mb 3"
    executor = FailingExecutor(label, WorkerLost(FailureClass.OUT_OF_MEMORY, "none left"), times=2)
    with pytest.raises(ClusterError):
        compress_local(model, tmp_path, executor=executor, workers=2)
    (reproducer,) = (tmp_path / "failures").iterdir()
    seen, through = [], Stage._through

    def watched(stage, hidden, *, observed, ends):
        seen.append(ends)
        return through(stage, hidden, observed=observed, ends=ends)

    monkeypatch.setattr(Stage, "_through", watched)
    main(["reproduce", str(reproducer)])
    assert seen == [False, False]


def test_what_no_policy_knows_is_an_error_of_ours_and_no_traceback(model, tmp_path):
    error = WorkerFailed("Traceback ...\n  File\nZeroDivisionError: division by zero")
    executor = FailingExecutor("layer-00000", error, times=2)
    with pytest.raises(CompressionError, match="layer-00000 failed: ZeroDivisionError") as caught:
        compress_local(model, tmp_path, executor=executor, workers=2)
    assert caught.value.exit_code == 1
    assert "this is a bug" in caught.value.hint
