"""The phase that trains the whole model, as seen from the directory of a run."""

import io
import time

import pytest
from rich.console import Console

from actors.storage.files import Directory
from orchestrator.remote.snapshot import Watcher
from orchestrator.remote.watch_screen import lines, screen
from orchestrator.rundir import lease
from orchestrator.rundir.journal import Journal

UNITS = 6  # of the phase: the training, and five behind it


def seen(tmp_path, taken, *, units=0, phase="recover"):
    """Return a snapshot 10 s after the last checkpoint, of a training that has one every 100 s."""
    run, now = Directory(str(tmp_path)), time.time()
    journal = Journal(run, lambda _: None)
    last = now - 10 - 5 * units
    begun = last - 100 * len(taken)
    journal.emit("phase begins", unit="run", at=begun)
    journal.emit("phase begins", unit=phase, tokens=UNITS, at=begun)
    for number, step in enumerate(taken, start=1):
        loss = 0.5 - 0.1 * number
        said = f"step {step} of 48, loss {loss:.4g}, held out {loss + 0.02:.4g}"
        journal.emit("training", unit="recover-model", worker="group", tokens=step * 2048,
                     loss=loss, detail=said, at=begun + 100 * number)  # fmt: skip
    for number in range(units):
        journal.emit("export_layer", unit=f"export-layer-{number:05d}", worker="worker-0",
                     start=last, seconds=5.0, at=last + 5 * number)  # fmt: skip
    journal.flush()
    with lease.held(run):
        return Watcher(run.uri).snapshot(now=now)


def drawn(snapshot, width=100):
    console = Console(width=width, color_system=None, file=io.StringIO())
    console.print(screen(snapshot, price=0.0, now=time.time(), width=width))
    return console.file.getvalue()


def test_the_phase_is_as_far_as_the_steps_of_the_training(tmp_path):
    phase = seen(tmp_path, [8, 16]).phase
    assert (phase.done, phase.total) == (16, 48)
    assert phase.tokens_per_second == pytest.approx(8 * 2048 / 100)
    assert phase.seconds_left == pytest.approx(400 - 10, abs=1)


def test_after_the_training_the_units_behind_it_count_at_their_own_rate(tmp_path):
    phase = seen(tmp_path, [24, 48], units=2).phase
    assert (phase.done, phase.total) == (3, UNITS)
    assert phase.seconds_left == pytest.approx(20 / 2 * 3, abs=1)


@pytest.mark.parametrize("width", [60, 100])
def test_the_screen_shows_the_losses_and_their_curve_in_its_width(tmp_path, width):
    text = drawn(seen(tmp_path, [8, 16, 24]), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    line = next(line for line in text.splitlines() if line.startswith("training "))
    assert line.startswith("training loss 0.2 \u00b7 held out 0.22 \u00b7 49,152 tokens")
    assert line.rstrip().endswith("\u2588\u2585\u2581"), line


def test_a_log_line_of_the_phase_has_the_losses(tmp_path):
    said = list(lines(None, seen(tmp_path, [8, 16])))
    assert any(
        line.startswith("recover: 16/48") and line.endswith("held out 0.32 \u00b7 32,768 tokens")
        for line in said
    )


def test_other_phases_and_runs_without_a_training_show_none(tmp_path):
    assert "training " not in drawn(seen(tmp_path / "a", []))
    assert "training " not in drawn(seen(tmp_path / "b", [8], phase="evaluate"))


def test_a_phase_without_a_checkpoint_yet_says_what_it_waits_for(tmp_path):
    assert "loading both models" in drawn(seen(tmp_path, []))
