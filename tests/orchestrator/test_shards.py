"""Calibration in shards: the recipe's shards fix the bytes, the workers only how fast they come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.storage.files import Directory
from actors.storage.records import read_records
from actors.storage.tensors import read_tensors
from tests.builders import DyingDriver, compress_local, save_model, worker_gib
from tests.orchestrator.test_pipeline import CountingExecutor, UnreliableExecutor, assert_same
from tests.strategies import whole_runs

SHARDS = 3  # of 5 microbatches: one, two and two
SEEDS, WORKERS = st.integers(0, 2**32), st.integers(1, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    compress_local(model, out)
    return out


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out, calibration=in_shards())
    return out


def in_shards(shards=SHARDS, **more):
    return {"shards": shards, **more}


def sums(run, layer):
    return read_tensors(Directory(str(run)), f"stats/layer-{layer:05d}.safetensors")


def test_shards_sum_to_the_whole_but_for_rounding(whole, undisturbed):
    for layer in range(4):
        one, several = sums(whole, layer), sums(undisturbed, layer)
        assert one.keys() == several.keys()
        for name, tensor in one.items():
            scale = tensor.abs().max()
            assert (tensor - several[name]).abs().max() <= 1e-6 * scale, name
    assert sums(whole, 0)["num_tokens"] == sums(undisturbed, 0)["num_tokens"]


def test_nothing_of_a_shard_is_left(undisturbed):
    assert not [n for n in read_records(Directory(str(undisturbed))) if "shard" in n]
    assert not list(undisturbed.glob("shards/*"))
    assert not list(undisturbed.glob("partial/*"))


@pytest.mark.parametrize(
    ("workers", "loads"),
    [
        pytest.param(1, 3 + 2, id="one worker passes shard after shard"),
        pytest.param(2, 3 + 2 + 2, id="two shards, then one"),
        pytest.param(3, 3 + 2 + 2, id="all side by side"),
        pytest.param(7, 6 + 4 + 4, id="in two stages each, one worker has nothing to do"),
    ],
)
def test_shards_pass_side_by_side_as_far_as_there_are_workers(
    model, undisturbed, tmp_path, workers, loads
):
    executor = CountingExecutor()
    compress_local(model, tmp_path, executor=executor, workers=workers, calibration=in_shards())
    stages = 2 if workers == 7 else 1
    assert executor.num_calls == {
        "load": loads,
        "step": (5 + 2 + 2) * stages,  # evaluation has two parts
        "publish": 4 * SHARDS,
        "work": 4 + 9 + 4 + 2,  # what adds shards, sites, layers, embedding and head
        "written": 4 * SHARDS + 4 + 9 + 4 + 2,
    }
    assert_same(tmp_path, undisturbed)


@whole_runs(one_in=8)
@given(seed=SEEDS, workers=WORKERS)
def test_losses_at_any_moment_change_no_bit(model, undisturbed, tmp_path_factory, seed, workers):
    out = tmp_path_factory.mktemp("disturbed")
    executor = UnreliableExecutor(seed, max_losses=12, loss=0.1)
    calibration = in_shards(save_microbatches=1)
    compress_local(model, out, executor=executor, workers=workers, calibration=calibration)
    assert_same(out, undisturbed)


@whole_runs(one_in=12)
@given(seed=SEEDS, workers=WORKERS, num_layers=st.integers(1, 2))
def test_nor_do_losses_in_any_wave(model, undisturbed, tmp_path_factory, seed, workers, num_layers):
    out = tmp_path_factory.mktemp("disturbed")
    executor = UnreliableExecutor(seed, max_losses=12, loss=0.1)
    compress_local(
        model, out, executor=executor, workers=workers, calibration=in_shards(),
        worker_gib=worker_gib(model, num_layers=num_layers),
        listener=executor.rest_during_evaluation,
    )  # fmt: skip
    assert_same(out, undisturbed)


@pytest.mark.parametrize(
    ("kind", "count"), [("calibrate", 4), ("shard", 5), ("statistics", 2), ("basis", 1)]
)
def test_the_next_driver_goes_on_with_other_workers(model, undisturbed, tmp_path, kind, count):
    dying = DyingDriver(kind, count)
    compress_local(model, tmp_path, workers=2, calibration=in_shards(), listener=dying)
    assert not list(tmp_path.glob("model/model-*"))
    executor = CountingExecutor()
    compress_local(model, tmp_path, executor=executor, workers=6, calibration=in_shards())
    assert_same(tmp_path, undisturbed)
    if kind in ("statistics", "basis"):  # all shards were there
        assert "publish" not in executor.num_calls
    test_nothing_of_a_shard_is_left(tmp_path)


def test_a_shard_that_is_through_a_wave_does_not_pass_it_again(model, undisturbed, tmp_path):
    how = {"calibration": in_shards(), "worker_gib": worker_gib(model, num_layers=2)}
    # Of two waves the first is summed, of the second the first shard: both its layers.
    compress_local(model, tmp_path, listener=DyingDriver("shard", 2 * SHARDS + 2), **how)
    executor = CountingExecutor()
    compress_local(model, tmp_path, executor=executor, **how)
    assert_same(tmp_path, undisturbed)
    assert executor.num_calls["step"] == (2 + 2) + 2 * 2 * 2  # two parts, in two waves, two models


def test_there_are_no_more_shards_than_microbatches(model, tmp_path):
    found = [tmp_path / "five", tmp_path / "hundred"]
    for out, shards in zip(found, (5, 100), strict=True):
        compress_local(model, out, workers=9, calibration=in_shards(shards))
    assert_same(*found)


@pytest.mark.parametrize("method", ["modegpt", "svdllm"])
def test_every_kind_of_statistic_adds_up(model, tmp_path, method):
    outs = [tmp_path / "whole", tmp_path / "shards"]
    for out, calibration in zip(outs, ({}, in_shards(SHARDS)), strict=True):
        compress_local(model, out, workers=3, method=method, keep_fraction=0.8,
                       calibration=calibration)  # fmt: skip
    for layer in range(4):
        one, several = (sums(out, layer) for out in outs)
        assert one.keys() == several.keys()
        for name, tensor in one.items():
            assert (tensor - several[name]).abs().max() <= 1e-6 * tensor.abs().max(), name
        if "probe" in one:
            assert one["probe"].equal(several["probe"])


def test_grams_of_less_precision_are_rounded_once(model, undisturbed, tmp_path):
    compress_local(model, tmp_path, statistics_dtype="float32", calibration=in_shards())
    for layer in range(4):
        exact, stored = sums(undisturbed, layer), sums(tmp_path, layer)
        for name, tensor in stored.items():
            assert tensor.equal(exact[name].to(tensor.dtype)), name
