"""The events of a training: in the journal, in the metrics, and on the progress line of a run."""

import io
from functools import partial

import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console

from actors.storage.files import Directory
from orchestrator.backend.metrics import Meters
from orchestrator.cli.progress import ProgressScreen
from orchestrator.rundir.journal import SCHEMA, Journal, read_events
from orchestrator.rundir.training_state import TRAINING, detail, training_state
from tests.orchestrator.test_new_kind import event


def checkpoint(step, *, steps=48, loss=0.31, held_out="0.3", at=0.0):
    said = f"step {step} of {steps}, loss {loss}, held out {held_out}"
    return event(kind="training", unit="recover-model", worker="group", at=at, start=1.0,
                 seconds=5.0, tokens=step * 2048, loss=loss, detail=said)  # fmt: skip


def test_the_journal_keeps_the_loss_and_reads_files_that_have_none(tmp_path):
    run = Directory(str(tmp_path))
    old = pa.Table.from_pylist(
        [{"at": 1.0, "kind": "layer", "unit": "layer-00000"}],
        schema=pa.schema([field for field in SCHEMA if field.name != "loss"]),
    )
    sink = pa.BufferOutputStream()
    parquet.write_table(old, sink)
    run.write("events/1.parquet", sink.getvalue().to_pybytes())
    journal = Journal(run, lambda _: None)
    journal.emit("training", unit="recover-model", loss=0.25)
    journal.emit("layer", unit="layer-00001")
    journal.flush()
    assert [row["loss"] for row in read_events(run)] == [None, 0.25, None]


def test_a_training_is_as_far_as_its_last_checkpoint():
    assert training_state([event(kind="layer", unit="layer-00000")]) is None
    state = training_state([checkpoint(8, loss=0.4, at=10.0), checkpoint(24, at=26.0)])
    assert (state.step, state.steps, state.is_done) == (24, 48, False)
    assert (state.loss, state.held_out, state.tokens) == (0.31, 0.3, 24 * 2048)
    assert state.losses == [0.4, 0.31]
    assert state.seconds_left == pytest.approx(24.0)
    assert state.tokens_per_second == pytest.approx(2048.0)
    assert state.text == "loss 0.31 \u00b7 held out 0.3"


def test_steps_that_are_taken_again_count_once():
    events = [checkpoint(8, loss=0.5), checkpoint(16, loss=0.4), checkpoint(16, loss=0.3)]
    assert training_state(events).losses == [0.5, 0.3]


def test_losses_that_are_no_numbers_are_said_and_left_out_of_the_curve():
    state = training_state([checkpoint(8), checkpoint(16, loss=None, held_out="not a number")])
    assert (state.loss, state.held_out, state.losses) == (None, None, [0.31])
    assert state.text == "loss is no number"


def test_a_single_checkpoint_has_no_rate():
    state = training_state([checkpoint(8)])
    assert (state.seconds_left, state.tokens_per_second) == (None, 0.0)


def test_the_metrics_have_its_loss_and_tokens_and_count_no_unit(monkeypatch):
    meters, shown = Meters((), price_per_hour=0.0), {}
    for name in ("_loss", "_trained"):
        monkeypatch.setattr(getattr(meters, name), "set", partial(shown.__setitem__, name))
    monkeypatch.setattr(meters, "_count_unit", lambda *_: pytest.fail("it is no unit"))
    meters(checkpoint(8))
    assert shown == {"_loss": 0.31, "_trained": 8 * 2048}
    meters(checkpoint(16, loss=None))
    assert shown == {"_loss": 0.31, "_trained": 16 * 2048}


def progress(events, *, terminal=False):
    """Return what a run's own screen printed, and the totals of its last task."""
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
    with ProgressScreen(console, num_workers=2) as screen:
        for each in events:
            screen._last_line = 0.0 - 1e9  # each line is due
            screen(each)
        task = screen._progress.tasks[-1]
        seen = task.completed, task.total, task.fields["rate"]
    return console.file.getvalue(), seen


def test_the_progress_line_counts_the_steps_and_then_the_units_behind_them():
    begin = event(kind="phase begins", unit="recover", tokens=5)
    said, (done, total, rate) = progress([begin, checkpoint(16, loss=0.4), checkpoint(32, at=9.0)])
    assert (done, total) == (32, 48)
    assert rate == "loss 0.31 \u00b7 held out 0.3 \u2588\u2581"
    assert (
        "recover: step 32 of 48, loss 0.31 \u00b7 held out 0.3 \u2588\u2581, about 9 s left" in said
    )
    unit = event(kind="export_layer", unit="export-layer-00000", worker="worker-0", start=1.0)
    _, (done, total, _) = progress([begin, checkpoint(48), unit])
    assert (done, total) == (2, 5)


def test_a_local_recovery_is_counted_by_its_units():
    begin = event(kind="phase begins", unit="recover", tokens=4)
    units = [
        event(kind="inputs", unit="inputs-layer-00000-shard-00000", worker="worker-0", tokens=64),
        event(kind="recover_layer", unit="recover-layer-00000", worker="worker-1"),
    ]
    _, (done, total, rate) = progress([begin, *units])
    assert (done, total) == (2, 4)
    assert "1 layer \u00b7 2 workers" in rate


@pytest.mark.parametrize("held_out", [0.3001, None])
def test_what_an_event_says_is_read_again(held_out):
    said = detail(16, 48, loss=0.25, held_out=held_out)
    event = {"kind": TRAINING, "detail": said, "at": 0.0, "tokens": 1, "loss": 0.25}
    found = training_state([event])
    assert (found.step, found.steps, found.held_out) == (16, 48, held_out)
