"""Partial sums: what a replaced worker, and the next driver, go on from, to the same bits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.storage.files import Directory
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.engine.partial_sums import MIN_SECONDS, SHARE, interval
from tests.builders import (
    DeadDriverError,
    DyingDriver,
    compress_local,
    run_local,
    save_model,
    worker_gib,
)
from tests.orchestrator.test_pipeline import CountingExecutor, UnreliableExecutor, assert_same
from tests.strategies import whole_runs

NUM_MICROBATCHES = 5  # 20 sequences by 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return out


class SlowToDieExecutor(CountingExecutor):
    """Loses the worker that has been given so many steps, once."""

    def __init__(self, after):
        super().__init__()
        self._after = after

    def call(self, handle, method, *args, num_returns=1, label):
        ticket = super().call(handle, method, *args, num_returns=num_returns, label=label)
        self._after -= int(method == "step")
        if self._after == 0:
            self._after = -1
            ticket[0].error = WorkerLost(FailureClass.NODE_LOST, label)
        return ticket


def partials(out):
    return Directory(str(out)).names("partial")


@whole_runs(one_in=10)
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 4), every=st.integers(1, 3))
def test_losses_while_sums_are_saved_change_no_bit(
    model, undisturbed, tmp_path_factory, seed, workers, every
):
    out = tmp_path_factory.mktemp("disturbed")
    executor = UnreliableExecutor(seed, max_losses=12, loss=0.1, during=("load", "step", "save"))
    compress_local(
        model, out, executor=executor, workers=workers, calibration={"save_microbatches": every}
    )
    assert_same(out, undisturbed)
    assert partials(out) == []


def test_a_replaced_worker_goes_on_behind_its_newest_partial_sums(model, undisturbed, tmp_path):
    executor = SlowToDieExecutor(after=5)
    compress_local(model, tmp_path, executor=executor, calibration={"save_microbatches": 2})
    # Microbatches 0 to 3 are in the sums: only the last is given again, to a second worker.
    assert executor.num_calls["step"] == NUM_MICROBATCHES + 1 + 2 + 2
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("memory", [False, True])
def test_the_next_driver_goes_on_in_the_middle_of_a_pass(model, undisturbed, tmp_path, memory):
    how = {"calibration": {"save_microbatches": 1}, "workers": 2}
    if memory:
        how["worker_gib"] = worker_gib(model, num_layers=1)
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, listener=DyingDriver("calibrate", 8), **how)
    assert partials(tmp_path)
    events = []
    compress_local(model, tmp_path, listener=events.append, **how)
    again = [e for e in events if e["kind"] == "calibrate"]
    begun = next(e for e in events if e["kind"] == "phase begins" and e["unit"] == "calibrate")
    assert len(again) < NUM_MICROBATCHES * (4 if memory else 2) - 4
    assert begun["tokens"] <= len(again)
    assert_same(tmp_path, undisturbed)
    assert partials(tmp_path) == []


def test_partial_sums_are_used_by_other_stages_than_wrote_them(model, undisturbed, tmp_path):
    how = {"calibration": {"save_microbatches": 1}}
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, listener=DyingDriver("calibrate", 8), workers=2, **how)
    executor = CountingExecutor()
    compress_local(model, tmp_path, executor=executor, workers=3, **how)
    assert executor.num_calls["step"] < (NUM_MICROBATCHES + 2 + 2) * 3
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_partial_sums_that_changed_count_as_none(model, undisturbed, tmp_path, harm):
    how = {"calibration": {"save_microbatches": 1}}
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path, listener=DyingDriver("calibrate", 3), **how)
    for name in partials(tmp_path):
        path = tmp_path / name
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        if harm == "delete":
            path.unlink()
        else:
            path.write_bytes(data if harm == "flip" else data[:-9])
    compress_local(model, tmp_path, **how)
    assert_same(tmp_path, undisturbed)


def test_a_short_pass_saves_nothing(model, tmp_path):
    executor = CountingExecutor()
    compress_local(model, tmp_path, executor=executor)
    assert executor.num_calls["save"] == 0


@given(step=st.floats(1e-3, 1e3), save=st.floats(0, 1e4))
def test_saving_takes_a_small_share_and_saves_no_less_than_a_minute(step, save):
    work = interval(step_seconds=step, save_seconds=save) * step
    assert save <= work * SHARE * (1 + 1e-9)
    assert work >= MIN_SECONDS * (1 - 1e-9)
    assert work - step < max(MIN_SECONDS, save / SHARE) * (1 + 1e-9)
