"""Where a run is written to: refused before anything starts, and what lies there is left alone."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from actors.storage.files import Directory
from orchestrator.phases.open_run import open_run
from orchestrator.run import run
from orchestrator.rundir.finished import finished_report
from planners.errors import ConfigError, StorageError
from tests.bad_input.refusals import attempt, refusal

IGNORE = [].append


@pytest.fixture
def refused_out(model):
    """Return a function that starts a run at a place, and returns why that is refused."""

    def call(error_class, out, *words, **recipe):
        def start():
            # Refused before a cluster is asked for: none answers at this address.
            recipe.setdefault("address", "192.0.2.1:1")
            return run(attempt(model, out, **recipe), listener=IGNORE)

        return refusal(error_class, start, *words)

    return call


@pytest.fixture
def another(model, tmp_path):
    """The directory of a run of the model."""
    open_run(attempt(model, tmp_path / "another"))
    return tmp_path / "another"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_refused(refused_out, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused_out(StorageError, tmp_path / "out", f"cannot write to the run directory: {tmp_path}")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_directory_below_a_file_is_refused(refused_out, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused_out(StorageError, tmp_path / "file" / "out", "cannot write to the run directory")


@pytest.mark.parametrize("out", ["/proc/run", "x" * 300, "a\0b", "~nobody-here/run"])
def test_a_directory_that_cannot_be_made_is_refused(refused_out, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_out(StorageError, out)


@pytest.mark.parametrize("out", ["https://example.org/run", "nonsense://x/y", "s3://", "://"])
def test_an_address_that_is_no_store_is_refused(refused_out, out):
    refused_out(StorageError, out, out.partition("://")[0])


def test_a_directory_that_is_read_only_is_refused(refused_out, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", out], check=False).returncode:
        if os.geteuid() == 0:
            pytest.skip("may not mount, and root may write anywhere else")
        out.chmod(0o500)
    try:
        refused_out(StorageError, out / "run", "cannot write to the run directory")
    finally:
        subprocess.run(["umount", out], check=False, capture_output=True)
        out.chmod(0o700)


def test_the_directory_of_another_run_is_refused_by_what_differs(refused_out, another):
    before = contents(another)
    refused_out(
        ConfigError, another, "holds a different run: ", "slice was 0.25, is 0.5", slice=0.5
    )
    refused_out(ConfigError, another, "calibration data was ", calibration__sequences=3)
    assert contents(another) == before


def test_a_run_of_an_older_version_is_refused_as_such_and_left_alone(
    refused_out, another, tmp_path
):
    out = shutil.copytree(another, tmp_path / "old")
    plan = json.loads((out / "plan.json").read_text())
    del plan["identity"]["schema"]
    (out / "plan.json").write_text(json.dumps(plan))
    before = contents(out)
    refused_out(
        ConfigError, out, "another version of compress-cluster", "have schema 1, this version"
    )
    refused_out(
        ConfigError, tmp_path / "new", "another version of compress-cluster", stats=str(out)
    )
    assert contents(out) == before


@pytest.mark.parametrize("name", ["notes.txt", "model/config.json", "src/main.py", "READY"])
def test_a_directory_of_other_things_is_refused_and_left_alone(refused_out, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    first = Path(name).parts[0]
    refused_out(StorageError, tmp_path / "out", f"holds '{first}' and is not a run directory")
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_the_model_itself_is_refused(refused_out, model):
    before = contents(model)
    refused_out(StorageError, model, "and is not a run directory")
    assert contents(model) == before


def test_an_empty_directory_is_taken(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".nfs0001").touch()
    (out / "plan.json.0123.tmp").touch()  # of a driver that was killed in its first moment
    open_run(attempt(model, out))
    assert (out / "plan.json").stat().st_size > 0


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"identity": []}', '{"identity": 3}'])
def test_a_torn_plan_is_written_again(model, tmp_path, text):
    prepared = attempt(model, tmp_path / "out")
    open_run(prepared)
    plan = (tmp_path / "out" / "plan.json").read_bytes()
    (tmp_path / "out" / "plan.json").write_text(text)
    open_run(prepared)
    assert (tmp_path / "out" / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udc80"])
def test_a_torn_report_is_none(tmp_path, text):
    (tmp_path / "READY").touch()
    (tmp_path / "report.json").write_text(text, errors="surrogateescape")
    assert finished_report(Directory(str(tmp_path))) is None


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIA:wJalr@bucket/run", "s3://AKIA:wJa/lr@bucket/run", "gs://me:wJalr@bucket"],
)
def test_keys_in_an_address_are_refused_and_not_repeated(refused_out, uri):
    said = refused_out(
        StorageError, uri, "a URI must not contain credentials", "AWS_SECRET_ACCESS_KEY"
    )
    assert "wJa" not in said
    assert "AKIA" not in said
