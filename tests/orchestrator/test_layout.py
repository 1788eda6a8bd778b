"""What a run directory holds, and what of it goes when the work is done."""

import pytest

from actors.storage.files import Directory, FileEntry
from actors.storage.records import Record, write_record
from orchestrator.experiments.inspect import check_files
from orchestrator.rundir.layout import FOLDERS, GOES, passed_files, spent_files
from tests.builders import run_local, save_model

NAMES = {folder.name for folder in FOLDERS}
SUMMED = {"stats", "basis"}
PASSING = {"shards", "partial", "boundary", "draft", "refit"}
PASSING |= {"unrecovered", "recovered", "training"}
WRITTEN = {"events", "records", "failures", "steps"}


def full(folder):
    run = Directory(str(folder))
    for name in NAMES:
        run.write(f"{name}/whole", b"1")
        run.write(f"{name}/half.tmp", b"1")
    return run


def left(run):
    return {name.partition("/")[0] for name in run.names() if name.endswith("/whole")}


@pytest.mark.parametrize("keep_statistics", [False, True])
def test_a_run_that_is_ready_keeps_its_result_and_what_was_asked_for(tmp_path, keep_statistics):
    run = full(tmp_path)
    for name in list(spent_files(run, keep_statistics=keep_statistics)):
        run.delete(name)
    kept = {"tokens", "model", "deci"} | WRITTEN | (SUMMED if keep_statistics else set())
    assert left(run) == kept == NAMES - PASSING - (set() if keep_statistics else SUMMED)
    assert not [name for name in run.names() if name.endswith(".tmp")]


@pytest.mark.parametrize("keep_statistics", [False, True])
def test_a_step_leaves_its_records_and_the_statistics_that_were_asked_for(
    tmp_path, keep_statistics
):
    step = full(tmp_path)
    for name in list(passed_files(step, keep_statistics=keep_statistics)):
        step.delete(name)
    assert left(step) == WRITTEN | ({"tokens", "stats"} if keep_statistics else set())


def test_a_finished_run_has_no_folder_that_is_not_known_and_none_that_goes(tmp_path):
    model, out = save_model(tmp_path / "model"), tmp_path / "run"
    run_local(model, out, method="slicegpt", slice=0.25, keep_statistics=True)
    run = Directory(str(out))
    found = {name.partition("/")[0] for name in run.names() if "/" in name}
    assert {"model", "stats", "basis", "records"} <= found <= NAMES
    assert not found & {folder.name for folder in FOLDERS if folder.ready == GOES}
    # Its driver was killed between the record of the statistics and the end of this one.
    gone = FileEntry(path="partial/layer-00000-aa-2.safetensors", sha256="0" * 64, bytes=1)
    write_record(run, Record(unit="partial-layer-00000", fingerprint="f", files=(gone,)))
    assert check_files(run)["passed"]
