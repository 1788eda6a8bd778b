"""Statistics that a run kept: looked at, checked, given to other runs of the same data only."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from actors.numerics.packed import unpacked
from actors.storage import sums
from actors.storage.files import Directory
from actors.storage.records import read_records, write_record
from actors.storage.tensors import read_tensors, write_tensors
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli import main
from orchestrator.forecast.forecast import forecast_of
from orchestrator.forecast.pricing import Pricing
from orchestrator.phases.open_run import open_run
from orchestrator.run import run_on
from orchestrator.rundir import statistics
from planners.errors import ConfigError, StorageError
from planners.simulation.timetable import CostModel, timetable, transfer_bytes
from planners.units.work import KINDS, Work
from tests.builders import (
    LENGTH,
    DeadDriverError,
    compress_local,
    perplexity,
    prepared_run,
    save_model,
    save_tokens,
)

CLOCK = CostModel(rates=Work(**dict.fromkeys(KINDS, 1e9)))
UNIFORM = {"method": "modegpt", "keep_fraction": 0.8, "options": {"allocation": "uniform"}}
FFN = 56  # of the model of tests.builders
TAPS = ["k_rope.pair_energy", "mlp_hidden.gram", "q_rope.pair_energy", "v.head_gram"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    compress_local(model, out, **UNIFORM)
    return out


@pytest.fixture
def kept(first, tmp_path):
    """Return a copy that may be damaged."""
    return shutil.copytree(first, tmp_path / "kept")


def command(*arguments):
    result = CliRunner().invoke(main.cli, ["stats", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def test_ls_names_what_every_layer_holds(first):
    rows = command("ls", first)["layers"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["taps"] == TAPS
        assert row["num_tokens"] == 20 * LENGTH
        assert row["bytes"] == sum((first / name).stat().st_size for name in row["files"])


def test_show_says_what_the_sums_are_of(first, model):
    found = command("show", first)
    facts = prepared_run(model, first, **UNIFORM).facts
    assert {key: found[key] for key in statistics.IDENTITY} == {
        key: facts[key] for key in statistics.IDENTITY
    }
    assert (found["sequences"], found["sequence_length"]) == (20, LENGTH)
    assert found["taps"] == TAPS


def test_verify_passes_what_a_run_wrote(first):
    found = command("verify", first)
    assert found["passed"]
    assert found["layers"] == found["files"] == 3


@pytest.mark.parametrize("block_bytes", [1, 3000, 2**30])
def test_verify_passes_grams_that_are_stored_whole(kept, monkeypatch, block_bytes):
    monkeypatch.setattr(sums, "BLOCK_BYTES", block_bytes)  # a gram in one block, or in many
    rewritten(Directory(str(kept)), whole)
    assert command("verify", kept)["passed"]


def test_verify_names_a_file_with_another_byte(kept):
    path = kept / "stats" / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"layer-00001.*record"):
        statistics.verify(Directory(str(kept)))


def test_verify_names_a_file_that_is_gone(kept):
    (kept / "stats" / "layer-00002.safetensors").unlink()
    with pytest.raises(StorageError, match=r"layer-00002.*no such file"):
        statistics.verify(Directory(str(kept)))


def rewritten(run, change, *, layer=1):
    """Change the sums of a layer and its record with them, as a fault before the record would."""
    name = f"stats/layer-{layer:05d}.safetensors"
    tensors = read_tensors(run, name)
    change(tensors)
    entry = write_tensors(run, name, tensors)
    record = read_records(run)[f"statistics-layer-{layer:05d}"]
    write_record(run, type(record)(**{**_fields(record), "files": (entry,)}))


def _fields(record):
    return {name: getattr(record, name) for name in record.__slots__}


def whole(tensors):
    tensors["mlp_hidden.gram"] = unpacked(tensors["mlp_hidden.gram"])


def broken(tensors, key, index, value):
    if index is None:
        tensors[key] = tensors[key][:-1].clone()
    else:
        tensors[key][index] = value


FAULTS = {
    "NaN or infinite": ("mlp_hidden.gram", (40 * FFN + 3,), torch.nan),
    "not symmetric": ("mlp_hidden.gram", (40 * FFN + 3,), 1e6),
    "negative": ("mlp_hidden.gram", (50 * FFN + 50,), -1.0),
    "not a packed symmetric matrix": ("mlp_hidden.gram", None, None),
    "v.head_gram is not symmetric": ("v.head_gram", (1, 2, 3), 1e6),
    "v.head_gram has a negative": ("v.head_gram", (1, 2, 2), -1.0),
    "q_rope.pair_energy has entries": ("q_rope.pair_energy", (0, 0), torch.inf),
    "num_tokens is 7": ("num_tokens", (0,), 7),
}


WHOLE_FAULTS = {
    "NaN or infinite": ("mlp_hidden.gram", (40, 3), torch.nan),
    "not symmetric": ("mlp_hidden.gram", (40, 3), 1e6),
    "negative": ("mlp_hidden.gram", (50, 50), -1.0),
}


@pytest.mark.parametrize("block_bytes", [3000, 2**30])
@pytest.mark.parametrize("words", WHOLE_FAULTS)
def test_verify_refuses_whole_grams_that_can_be_none(kept, monkeypatch, words, block_bytes):
    monkeypatch.setattr(sums, "BLOCK_BYTES", block_bytes)
    run = Directory(str(kept))
    rewritten(run, whole)
    rewritten(run, lambda tensors: broken(tensors, *WHOLE_FAULTS[words]))
    with pytest.raises(StorageError, match=f"layer-00001.*{words}"):
        statistics.verify(run)


@pytest.mark.parametrize("words", FAULTS)
def test_verify_refuses_sums_that_can_be_none(kept, words):
    run = Directory(str(kept))
    rewritten(run, lambda tensors: broken(tensors, *FAULTS[words]))
    with pytest.raises(StorageError, match=f"layer-00001.*{words}"):
        statistics.verify(run)


@pytest.mark.parametrize("action", ["ls", "show", "verify"])
def test_a_run_without_statistics_is_told_from_no_run(kept, tmp_path, action):
    shutil.rmtree(kept / "stats")
    with pytest.raises(StorageError, match="kept no statistics"):
        command(action, kept)
    with pytest.raises(StorageError, match="no run here"):
        command(action, tmp_path / "nothing")


def compressed(model, out, **recipe):
    """Do a run up to its verification, and return what listeners were told."""
    prepared, events = prepared_run(model, out, **recipe), []

    def listen(event):
        events.append(event)
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            raise DeadDriverError

    open_run(prepared)
    with pytest.raises(DeadDriverError):
        run_on(prepared, LocalExecutor(), listener=listen)
    return events


def test_statistics_of_the_same_model_and_data_serve_another_size(first, model, tmp_path):
    events = compressed(model, tmp_path, **{**UNIFORM, "keep_fraction": 0.7}, stats=str(first))
    assert not {e["kind"] for e in events} & {"statistics missing", "statistics"}
    assert not (tmp_path / "stats").exists()


def test_a_plan_counts_no_pass_for_what_another_run_has_summed(first, model, tmp_path):
    def planned(options, **how):
        prepared = prepared_run(model, tmp_path, **{**UNIFORM, "options": options}, **how)
        found = forecast_of(prepared, Pricing()).job
        calls = [p.name for p in timetable(found, CLOCK)].count("calibrate")
        return calls, transfer_bytes(found)

    own, reused = (
        planned({"allocation": "uniform"}),
        planned({"allocation": "uniform"}, stats=str(first)),
    )
    assert reused[0] == own[0] - 1
    assert reused[1] <= own[1]
    more = {"allocation": "influence"}  # of which one statistic is not there
    assert planned(more, stats=str(first))[0] == planned(more)[0]


def test_statistics_that_are_stored_whole_give_the_same_result(kept, first, model, tmp_path):
    for layer in range(3):
        rewritten(Directory(str(kept)), whole, layer=layer)
    recipe = {**UNIFORM, "keep_fraction": 0.7}
    compressed(model, tmp_path / "whole", **recipe, stats=str(kept))
    compressed(model, tmp_path / "packed", **recipe, stats=str(first))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "packed")


def test_statistics_in_single_precision_take_half_and_change_next_to_nothing(
    model, first, tmp_path
):
    halves = compress_local(model, tmp_path, **UNIFORM, statistics_dtype="float32")
    tensors = read_tensors(Directory(str(tmp_path)), "stats/layer-00001.safetensors")
    exact = read_tensors(Directory(str(first)), "stats/layer-00001.safetensors")
    assert tensors["mlp_hidden.gram"].dtype == torch.float32
    assert torch.equal(tensors["mlp_hidden.gram"], exact["mlp_hidden.gram"].float())
    assert torch.equal(tensors["v.head_gram"], exact["v.head_gram"])  # small: as it is summed
    assert halves["compressed"] == pytest.approx(perplexity(first, "compressed"), rel=1e-4)


def test_what_the_statistics_lack_is_said_and_only_that_is_calibrated(first, model, tmp_path):
    recipe = {**UNIFORM, "options": {"allocation": "influence"}}
    events = compressed(model, tmp_path / "more", **recipe, stats=str(first))
    (said,) = [e["detail"] for e in events if e["kind"] == "statistics missing"]
    assert said.startswith("resid_out.cosine in ")
    run = Directory(str(tmp_path / "more"))
    held = {key for name in run.names("stats") for key in read_tensors(run, name)}
    assert held == {"resid_out.cosine", "num_tokens"}
    compressed(model, tmp_path / "own", **recipe)
    assert files_of(tmp_path / "more") == files_of(tmp_path / "own")


def files_of(out):
    return {p.name: p.read_bytes() for p in (out / "model").glob("model-*")}


def test_statistics_of_another_model_are_refused(first, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="model revision"):
        compress_local(other, tmp_path / "out", **UNIFORM, stats=str(first))
    assert not (tmp_path / "out").exists()


OTHERS = {
    "calibration_dtype": {"calibration_dtype": "bfloat16"},
    "statistics_dtype": {"statistics_dtype": "float32"},
    "threads": {"threads": 2},
    "microbatch sequences": {"calibration": {"microbatch_tokens": LENGTH}},
}


@pytest.mark.parametrize("key", OTHERS)
def test_statistics_made_otherwise_are_refused(first, model, tmp_path, key):
    with pytest.raises(ConfigError, match=key):
        compress_local(model, tmp_path / "out", **UNIFORM, **OTHERS[key], stats=str(first))


def test_statistics_of_other_data_are_refused(first, model, tmp_path):
    path = save_tokens(tmp_path / "other.safetensors", 20, seed=5)
    with pytest.raises(ConfigError, match="calibration data"):
        compress_local(
            model, tmp_path / "out", **UNIFORM, calibration={"source": f"tokens:{path}"},
            stats=str(first),
        )  # fmt: skip


def test_what_is_no_run_has_no_statistics(model, tmp_path):
    with pytest.raises(StorageError, match="no run here"):
        compress_local(model, tmp_path / "out", **UNIFORM, stats=str(tmp_path / "nothing"))
