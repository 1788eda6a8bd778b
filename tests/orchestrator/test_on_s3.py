"""A run whose model and directory are on an object store: the same bytes as on a disk."""

import json
import re

import pytest
from click.testing import CliRunner

from actors.storage import retries
from actors.storage.files import Directory
from orchestrator.cli.main import cli, main
from orchestrator.rundir.layout import READY
from planners.errors import StorageError
from tests.builders import (
    DeadDriverError,
    DyingDriver,
    compress_local,
    result_files,
    run_local,
    save_model,
    started,
    worker_gib,
)
from tests.stores import KEYS, Fault


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return result_files(out)


def uploaded(folder, uri):
    target = Directory(uri)
    for path in folder.iterdir():
        if path.is_file():
            target.write(path.name, path.read_bytes())
    return uri


def stored(uri):
    """Return name -> bytes of a result on a store."""
    result = Directory(Directory(uri).below("model"))
    return {name: result.read(name) for name in result.names()}


def weights(files):
    """Return the files that do not say where the model came from."""
    return {k: v for k, v in files.items() if k not in ("config.json", "README.md")}


def test_a_run_from_store_to_store_is_ready_with_the_bytes_of_a_local_one(model, undisturbed, s3):
    out = s3("run")
    source = uploaded(model, s3("model"))
    report = run_local(model, out, source=source, keep_statistics=True)
    assert report["verdict"] == "READY"
    found = stored(out)
    assert found.keys() == undisturbed.keys()
    assert weights(found) == weights(undisturbed)
    run = Directory(out)
    assert run.size(READY)
    everything = b"".join(run.read(name) for name in run.names())
    assert not [key for key, secret in KEYS.items() if secret.encode() in everything]
    assert command("status", out)["verdict"] == "READY"
    assert command("report", out)["parameters"] == report["parameters"]
    assert [row["layer"] for row in command("stats", "ls", out)["layers"]] == [0, 1, 2]
    assert command("stats", "verify", out)["passed"]


def command(*arguments):
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert not any(secret in result.output for secret in KEYS.values())
    return json.loads(result.stdout)


def test_verify_finds_one_flipped_bit_on_a_store(model, s3, capsys):
    out = s3("run")
    compress_local(model, out)
    run = Directory(out)
    (name,) = [n for n in run.names("model") if n.startswith("model/model-00003-of-")]
    data = bytearray(run.read(name))
    data[-5] ^= 4
    run.write(name, bytes(data))
    with pytest.raises(SystemExit) as refused:
        main(["verify", out])
    assert refused.value.code == StorageError.exit_code
    assert re.search(rf"{name}.*layer-00001", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("death", "waves"), [(("statistics", 2, None), True), (("layer", 2, None), False)], ids=str
)
def test_a_run_on_a_store_goes_on_where_its_driver_died(model, undisturbed, s3, death, waves):
    out, (kind, count, unit) = s3("run"), death
    how = {"worker_gib": worker_gib(model, num_layers=1)} if waves else {}
    with pytest.raises(DeadDriverError):
        run_local(model, out, listener=DyingDriver(kind, count, unit=unit), **how)
    durable = started(out)
    compress_local(model, out, **how)
    after = started(out)
    again = {name for name, at in durable.items() if after[name] != at}
    assert {name for name in again if not name.startswith("boundary-")} == set()
    assert stored(out) == undisturbed


@pytest.mark.parametrize("after", [60, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_store_that_fails_in_the_middle_leaves_a_run_that_goes_on(
    model, undisturbed, faulty, monkeypatch, after
):
    monkeypatch.setattr(retries, "FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    out = faulty.uri("run")
    faulty.faults = [Fault("status", "GET PUT HEAD", path="run", after=after, code=503)]
    with pytest.raises(StorageError, match=r"tried \d times in"):
        compress_local(model, out)
    faulty.faults = []
    assert Directory(out).size(READY) is None
    durable = started(out)
    compress_local(model, out)
    assert {n for n, at in durable.items() if started(out)[n] != at} == set()
    assert stored(out) == undisturbed


def test_a_store_that_fails_now_and_then_is_not_noticed(model, undisturbed, faulty, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_DELAY_SECONDS", 0.001)
    faulty.faults = [
        Fault(kind, "GET" if kind in ("cut", "short") else "GET PUT HEAD", after=9 * n, times=2)
        for n, kind in enumerate(["status", "reset", "cut", "short"] * 4)
    ]
    compress_local(model, faulty.uri("run"))
    assert stored(faulty.uri("run")) == undisturbed
    assert all(fault.seen > fault.after for fault in faulty.faults)
