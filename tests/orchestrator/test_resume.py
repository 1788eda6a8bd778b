"""The same command again: what has a record is not done again, and the bytes are the same."""

import shutil
from collections import Counter

import pytest

from actors.storage.files import Directory
from orchestrator.run import run
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.journal import read_events
from planners.errors import ConfigError, NumericsError, StorageError
from tests.builders import (
    DeadDriverError,
    DyingDriver,
    compress_local,
    prepared_run,
    result_files,
    run_local,
    save_model,
    started,
    worker_gib,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def compressed(model, tmp_path_factory):
    """A run whose driver died before it verified; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("compressed") / "run"
    compress_local(model, out)
    return out


@pytest.fixture(scope="module")
def undisturbed(compressed):
    return result_files(compressed)


@pytest.fixture(scope="module")
def ready(model, tmp_path_factory):
    """A run that is READY, and what it reported; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("ready") / "run"
    return out, run_local(model, out)


DEATHS = (
    ("phase begins", 1, "calibrate"),
    ("calibrate", 3, None),
    ("statistics", 1, None),
    ("statistics", 3, None),
    ("evaluate", 2, None),
    ("basis", 4, None),
    ("layer", 2, None),
    ("embedding", 1, None),
    ("phase begins", 1, "stitch"),
    ("phase ends", 1, "stitch"),
    ("phase begins", 1, "verify"),
    ("phase begins", 1, "throughput"),
)


def die_and_go_on(model, out, death, **how):
    """Return the units of the first driver that the second did again."""
    kind, count, unit = death
    with pytest.raises(DeadDriverError):
        run_local(model, out, listener=DyingDriver(kind, count, unit=unit), **how)
    assert not (out / "READY").exists()
    durable = started(out)
    compress_local(model, out, **how)
    after = started(out)
    return {name for name, at in durable.items() if after[name] != at}


@pytest.mark.parametrize("death", DEATHS, ids=str)
def test_a_driver_that_died_is_followed_by_one_that_does_the_rest(
    model, undisturbed, tmp_path, death
):
    assert die_and_go_on(model, tmp_path, death) == set()
    assert result_files(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "death", [d for d in DEATHS if d[0] in ("statistics", "evaluate")], ids=str
)
def test_so_it_is_where_the_model_goes_through_in_waves(model, undisturbed, tmp_path, death):
    memory = worker_gib(model, num_layers=1)
    again = die_and_go_on(model, tmp_path, death, workers=2, worker_gib=memory)
    assert {name for name in again if not name.startswith("boundary-")} == set()
    assert result_files(tmp_path) == undisturbed


def test_a_driver_may_die_again_and_again(model, undisturbed, tmp_path):
    for kind in ("statistics", "evaluate", "basis", "basis", "layer", "layer", "head"):
        with pytest.raises(DeadDriverError):
            run_local(model, tmp_path, listener=DyingDriver(kind, 1))
    report = run_local(model, tmp_path)
    assert report["resumed_units"] > 10
    assert result_files(tmp_path) == undisturbed
    told = Counter(e["unit"] for e in read_events(Directory(str(tmp_path))) if e["kind"] == "layer")
    assert set(told.values()) == {1}


# What may be lost, and the units that are done again for it.
LOSSES = {
    "a layer's file": (["model/model-00004-of-00006.safetensors"], {"layer-00002"}),
    "a layer's record": (["records/layer-00001.json"], {"layer-00001"}),
    "a basis that all that read it have read": (["basis/basis-site-00003.safetensors"], set()),
    "a basis and what was made of it": (
        ["basis/basis-site-00000.safetensors", "model/model-00001-of-00006.safetensors"],
        {"basis-site-00000", "embedding"},
    ),
    "statistics": (["stats/layer-00001.safetensors"], {"statistics-layer-00001"}),
    "the head": (["model/model-00006-of-00006.safetensors"], {"head"}),
    "an evaluation": (
        ["records/evaluation-compressed-part-00001.json"],
        {"evaluation-compressed-part-00001"},
    ),
    "the index": (["model/model.safetensors.index.json"], {"stitch"}),
    "several": (
        ["model/model-00002-of-00006.safetensors", "records/embedding.json", "model/config.json"],
        {"layer-00000", "embedding", "stitch"},
    ),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_only_what_is_lost_is_done_again(model, compressed, undisturbed, tmp_path, lost):
    files, units = LOSSES[lost]
    out = shutil.copytree(compressed, tmp_path / "run")
    before = started(out)
    for name in files:
        (out / name).unlink()
    compress_local(model, out, keep_statistics=True)
    after = started(out)
    assert {name for name in before if after[name] != before[name]} == units
    assert result_files(out) == undisturbed


def test_what_a_killed_worker_left_half_written_disturbs_nobody(model, undisturbed, tmp_path):
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, listener=DyingDriver("basis", 1))
    for name in ("stats/layer-00001.safetensors", "model/model-00005-of-00006.safetensors"):
        path = tmp_path / f"{name}.0123456789ab.tmp"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    run_local(model, tmp_path)  # which clears them away when it is READY
    assert result_files(tmp_path) == undisturbed


def test_a_finished_run_gives_its_report_at_once(model, ready, tmp_path):
    out = shutil.copytree(ready[0], tmp_path / "run")
    assert Directory(str(out)).names("stats") == []
    before = {p: p.stat().st_mtime_ns for p in (out / "model").iterdir()}
    events = []
    assert run(prepared_run(model, out), listener=events.append) == ready[1]
    assert events == []
    assert {p: p.stat().st_mtime_ns for p in (out / "model").iterdir()} == before


def test_a_finished_run_keeps_statistics_where_asked(model, tmp_path):
    run_local(model, tmp_path, keep_statistics=True)
    assert len(Directory(str(tmp_path)).names("stats")) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slice": 0.5}, ["slice was 0.25, is 0.5"]),
        ({"keep_fraction": 0.9}, ["slice was 0.25, is None", "keep_fraction"]),
        ({"options": {"rotation": "shared"}}, ["options"]),
        ({"calibration": {"sequences": 9}}, ["calibration data"]),
        ({"evaluation": {"sequences": 3}}, ["evaluation data"]),
        ({"calibration": {"microbatch_tokens": 24}}, ["microbatch sequences was 4, is 1"]),
        ({"calibration_dtype": "bfloat16"}, ["calibration_dtype was float32, is bfloat16"]),
    ],
)
def test_the_directory_of_another_run_is_refused_with_what_differs(model, tmp_path, changes, words):
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, listener=DyingDriver("statistics", 2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        run_local(model, tmp_path, **changes)
    assert all(word in str(caught.value) for word in [*words, "holds a different run"])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_another_model_is_another_run(model, tmp_path):
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path / "run", listener=DyingDriver("statistics", 2))
    other = save_model(tmp_path / "other", num_hidden_layers=4, seed=1)
    with pytest.raises(ConfigError, match="model revision"):
        run_local(other, tmp_path / "run")


def test_a_directory_with_a_model_of_the_user_is_left_alone(model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(StorageError, match="is not a run directory"):
        run_local(model, tmp_path)


def test_tokens_beside_a_torn_plan_are_not_taken_for_those_of_this_run(
    model, undisturbed, tmp_path
):
    driver = DyingDriver("phase begins", 1)
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, calibration={"sequences": 9}, listener=driver)
    (tmp_path / "plan.json").write_bytes(b"{")
    compress_local(model, tmp_path)
    assert result_files(tmp_path) == undisturbed


def test_a_finished_run_that_lost_a_file_is_made_whole(model, ready, undisturbed, tmp_path):
    out = shutil.copytree(ready[0], tmp_path / "run")
    (out / "model" / "model-00003-of-00006.safetensors").unlink()
    assert finished_report(Directory(str(out))) is None
    assert not (out / "READY").exists()
    run_local(model, out)
    assert finished_report(Directory(str(out)))["verdict"] == "READY"
    assert result_files(out) == undisturbed


@pytest.mark.parametrize(("name", "number"), [("layer-00001", 3), ("embedding", 1), ("head", 6)])
def test_one_flipped_bit_is_found_and_mended_before_a_run_is_ready(
    model, compressed, undisturbed, tmp_path, name, number
):
    out = shutil.copytree(compressed, tmp_path / "run")
    before = started(out)
    file = f"model/model-{number:05d}-of-00006.safetensors"
    flip(out / file)
    events = []
    compress_local(model, out, listener=events.append)
    assert [e["detail"] for e in events if e["kind"] == "damaged"] == [file]
    after = started(out)
    assert {unit for unit in before if after[unit] != before[unit]} == {name}
    assert result_files(out) == undisturbed


@pytest.mark.parametrize("whole", [True, False])
def test_one_bit_that_flips_while_the_result_is_verified_is_found(
    model, undisturbed, tmp_path, whole
):
    how = {} if whole else {"worker_gib": worker_gib(model, num_layers=2)}

    def spoil(event):
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            flip(tmp_path / "model" / "model-00003-of-00006.safetensors")

    with pytest.raises(NumericsError, match="every tensor as computed"):
        run_local(model, tmp_path, listener=spoil, **how)
    assert not (tmp_path / "READY").exists()
    assert not (tmp_path / "report.json").exists()
    compress_local(model, tmp_path, **how)
    assert result_files(tmp_path) == undisturbed


def test_storage_that_spoils_what_is_written_again_and_again_ends_in_an_error(model, tmp_path):
    def spoil(event):
        if event["unit"] == "layer-00001":
            flip(tmp_path / "model" / "model-00003-of-00006.safetensors")

    with pytest.raises(
        StorageError, match=r"model-00003-of-00006.safetensors: differs from what was written"
    ):
        run_local(model, tmp_path, listener=spoil)
    assert not (tmp_path / "READY").exists()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def test_after_ready_one_layer_costs_its_own_statistics_and_sites_alone(
    model, ready, undisturbed, tmp_path
):
    out = shutil.copytree(ready[0], tmp_path / "run")
    assert Directory(str(out)).names("stats") == []
    before = started(out)
    flip(out / "model" / "model-00004-of-00006.safetensors")
    prepared = prepared_run(model, out)
    assert finished_report(prepared.run) is not None, "sizes are as they were"
    assert finished_report(prepared.run, hashes=True) is None
    run_local(model, out)
    after = started(out)
    assert {unit for unit in before if after[unit] != before[unit]} == {
        "layer-00002",
        "statistics-layer-00002",
        "statistics-layer-00003",
        *(f"basis-site-{site:05d}" for site in (4, 5, 6)),
    }
    assert result_files(out) == undisturbed
    assert finished_report(prepared.run, hashes=True)["verdict"] == "READY"
