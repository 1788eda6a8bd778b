"""Every file of a finished run, torn in every way: found, named, and mended by the same command."""

import itertools
import json
import re
import shutil

import pytest

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.backend.local import LocalExecutor
from orchestrator.experiments import inspect
from orchestrator.phases.open_run import check_run, open_run
from orchestrator.run import run_on
from orchestrator.rundir.finished import finished_report
from planners.errors import StorageError
from tests.builders import prepared_run, result_files, run_local, save_model, started


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    run_local(model, out)
    return out


@pytest.fixture
def torn(finished, tmp_path):
    """A copy of the finished run, to be torn."""
    return shutil.copytree(finished, tmp_path / "run")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path):
    path.write_bytes(b"")


def flip_first(path):
    flip(path, 0)


def flip_middle(path):
    flip(path, path.stat().st_size // 2)


def flip_last(path):
    flip(path, path.stat().st_size - 1)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def delete(path):
    path.unlink()


TEARS = (truncate, cut_in_half, empty, flip_first, flip_middle, flip_last, delete)
FILES = (
    "READY",
    "report.json",
    "plan.json",
    "run.yaml",
    "environment.json",
    "tokens/calibration.parquet",
    "tokens/evaluation.parquet",
    "model/config.json",
    "model/model.safetensors.index.json",
    "model/modeling_compressed.py",
    "model/README.md",
    *(f"model/model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)),
    "records/statistics-layer-00000.json",
    "records/basis-site-00002.json",
    "records/layer-00001.json",
    "records/head.json",
    "records/stitch.json",
    "records/verify.json",
    "records/throughput.json",
    "records/evaluation-dense-part-00000.json",
    "records/evaluation-compressed-part-00001.json",
)
# What vouches for nothing: it is written again by the next command that has it to write.
UNVOUCHED = ("plan.json", "run.yaml", "environment.json", "tokens/")


def run_again(model, out):
    """Do what the command line does, all bytes compared; return the report."""
    prepared = prepared_run(model, out)
    known = check_run(prepared)
    report = finished_report(prepared.run, hashes=True) if known else None
    if report is not None:
        return report
    open_run(prepared)
    return run_on(prepared, LocalExecutor(), listener=[].append, verify_hashes=True)


def cases():
    """Yield every pair of file and tear; a sample of them is fast."""
    for number, (name, tear) in enumerate(itertools.product(FILES, TEARS)):
        marks = () if number % 13 == 0 else (pytest.mark.nightly,)
        yield pytest.param(name, tear, id=f"{name}-{tear.__name__}", marks=marks)


def units_of(out, name):
    """Return the units that wrote a file, or whose record it is."""
    records = read_records(Directory(str(out)))
    if name.startswith("records/"):
        return {name.removeprefix("records/").removesuffix(".json")}
    return {unit for unit, r in records.items() if name in {file.path for file in r.files}}


@pytest.mark.parametrize(("name", "tear"), list(cases()))
def test_a_torn_file_is_found_and_mended_and_nothing_else_is_done_again(
    model, finished, torn, name, tear
):
    tear(torn / name)
    run = Directory(str(torn))
    if is_vouched_for(name, tear):
        with pytest.raises(StorageError, match=re.escape(named(name, tear))):
            inspect.check_files(run)
    assert run_again(model, torn)["verdict"] == "READY"
    assert result_files(torn) == result_files(finished)
    assert inspect.check_files(run)["passed"]
    before, after = started(finished), started(torn)
    again = {unit for unit in before if before[unit] != after.get(unit)}
    # Beside the unit itself: what it reads, where that was dropped when the run was READY.
    dropped = {u for u in again if u.startswith(("statistics-", "basis-"))}
    assert again - dropped <= units_of(finished, name)
    if not name.startswith(("model/", "records/layer", "records/head")):
        assert dropped <= units_of(finished, name)


def is_vouched_for(name, tear):
    """Return whether a look at the bytes tells that a file is torn."""
    if name.startswith(UNVOUCHED):
        return False
    if tear is delete:  # what says that a unit without files in the result is done, or the mark
        return name.startswith(("model/", "records/layer", "records/head", "records/stitch"))
    return True


def named(name, tear):
    """Return what the complaint must name: of a record that is gone, the file it vouched for."""
    if tear is delete and name.startswith("records/"):
        unit = name.removeprefix("records/").removesuffix(".json")
        number = {"layer-00001": 3, "head": 4}.get(unit)
        return "model/" if number is None else f"model/model-{number:05d}-of-00004.safetensors"
    return name.rpartition("/")[2]


def test_several_torn_files_are_mended_in_one_go(model, finished, torn):
    flip_middle(torn / "model" / "model-00002-of-00004.safetensors")
    truncate(torn / "model" / "model.safetensors.index.json")
    empty(torn / "records" / "head.json")
    delete(torn / "records" / "verify.json")
    flip_last(torn / "report.json")
    delete(torn / "tokens" / "calibration.parquet")
    empty(torn / "plan.json")
    assert run_again(model, torn)["verdict"] == "READY"
    assert result_files(torn) == result_files(finished)
    assert inspect.check_files(Directory(str(torn)))["passed"]


def test_a_report_of_other_numbers_is_not_believed(torn):
    path = torn / "report.json"
    report = json.loads(path.read_text())
    report["parameters"]["after"] //= 2
    path.write_text(json.dumps(report))
    assert finished_report(Directory(str(torn))) is None


def test_a_file_that_nothing_vouches_for_is_named(torn):
    (torn / "model" / "model-00009-of-00009.safetensors").write_bytes(b"?")
    with pytest.raises(StorageError, match=r"model-00009-of-00009.safetensors: no record lists it"):
        inspect.check_files(Directory(str(torn)))
