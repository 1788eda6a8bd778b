"""A run as seen from its directory alone, as a screen and as lines of a log."""

import io
import json
import time

import pytest
from rich.console import Console

from actors.storage.files import Directory
from actors.storage.records import Record, write_record
from orchestrator.cli.main import main
from orchestrator.remote.snapshot import Watcher
from orchestrator.remote.time_left import Phase, time_left
from orchestrator.remote.watch_screen import lines, screen
from orchestrator.rundir import lease
from orchestrator.rundir.journal import Journal
from planners.units.kinds import DONE, MEASURED, SUMMED, WAITING
from tests.builders import compress_local, run_local, save_model

NOTICE = "node 4f1c8a was taken away by the spot market after a notice of 120 s"

FORECAST = {
    "device": "A100",
    "worker_bytes": 40 * 2**30,
    "price_per_hour": 2.0,
    "phases": {
        "calibrate": {"p10": 1200.0, "p50": 1300.0, "p90": 1700.0},
        "evaluate": {"p10": 90.0, "p50": 100.0, "p90": 130.0},
        "compress": {"p10": 900.0, "p50": 1000.0, "p90": 1500.0},
        "stitch": {"p10": 5.0, "p50": 5.0, "p90": 5.0},
    },
}
WEIGHT = (1300 + 100 + 1000 + 5) / 4


def ignore(_):
    pass


def begun(folder, num_layers=80, num_workers=8):
    """Write what a run of a large model leaves in its middle, by the run's own writers."""
    run = Directory(str(folder))
    shape = {"num_layers": num_layers, "model_type": "llama"}
    plan = {"plan": {"shape": shape}, "identity": {"method": "modegpt"}, "forecast": FORECAST,
            "title": "my-70b · modegpt · keep 0.8"}  # fmt: skip
    run.write("plan.json", json.dumps(plan).encode())
    journal = Journal(run, ignore)
    now = time.time()
    names = [f"worker-{slot}" for slot in range(num_workers)]
    journal.emit("phase begins", unit="run", at=now - 4000)
    journal.emit("phase begins", unit="calibrate", tokens=256, at=now - 4000)
    for index in range(256):
        journal.emit("calibrate", unit=f"microbatch {index}", worker=names[index % num_workers],
                     start=now - 3990 + index * 10, seconds=9.0, tokens=4096,
                     peak_bytes=31 * 2**30, at=now - 3980 + index * 10)  # fmt: skip
    journal.emit("preempted", worker="worker-3", at=now - 2000,
                 detail=f"preempted: {NOTICE}")  # fmt: skip
    journal.emit("phase ends", unit="calibrate", seconds=2600.0, at=now - 1400)
    journal.emit("phase begins", unit="compress", tokens=num_layers + 2, at=now - 900)
    for index in range(num_layers):
        if index < 70:
            write_record(run, Record(unit=f"statistics-layer-{index:05d}", fingerprint="f"))
        if index < 45:
            write_record(run, Record(unit=f"damage-layer-{index:05d}", fingerprint="f"))
        if index % 2 and index < 40:
            write_record(run, Record(unit=f"layer-{index:05d}", fingerprint="f"))
            journal.emit("layer", unit=f"layer-{index:05d}", worker=names[index % num_workers],
                         start=now - 800 + index, seconds=30.0, at=now - 780 + index)  # fmt: skip
    journal.flush()
    return run


def drawn(snapshot, width):
    console = Console(width=width, color_system=None, file=io.StringIO())
    console.print(screen(snapshot, price=1.5, now=time.time(), width=width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_shows_layers_workers_phase_money_and_losses_in_its_width(tmp_path, width):
    run = begun(tmp_path)
    with lease.held(run):
        snapshot = Watcher(run.uri).snapshot()
    text = drawn(snapshot, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    words = (
        "running   my-70b · modegpt · keep 0.8",
        "compress",
        "20/82",
        "15\N{NO-BREAK SPACE}min so far",
        "worker-7",
        "preempted",
        "33.3",
        "on A100",
        "remaining",
    )
    for word in words:
        assert word in text
    assert snapshot.verdict == "running"
    assert snapshot.layers[1] == DONE
    assert snapshot.layers[44] == MEASURED
    assert snapshot.layers[60] == SUMMED
    assert snapshot.layers[75] == WAITING
    assert snapshot.troubles == {"preempted": 1}
    assert [w.lost for w in snapshot.workers] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert snapshot.worker_hours == pytest.approx(4000 * 8 / 3600, rel=0.01)


@pytest.mark.parametrize(
    ("unit", "state"),
    [
        ("carried-layer-00001", SUMMED),
        ("damage-svdllm-layer-00001", MEASURED),
        ("losses-layer-00001", MEASURED),
        ("refit-layer-00001", MEASURED),
        ("shard-00002-layer-00001", WAITING),
        ("evaluation-dense-part-00001", WAITING),
    ],
)
def test_a_layer_is_as_far_as_any_of_its_units_says(tmp_path, unit, state):
    run = begun(tmp_path, num_layers=0)
    plan = {"plan": {"shape": {"num_layers": 2}}}
    run.write("plan.json", json.dumps(plan).encode())
    write_record(run, Record(unit=unit, fingerprint="f"))
    assert Watcher(run.uri).snapshot().layers == [WAITING, state]


@pytest.mark.parametrize("name", ["verify", "throughput"])
def test_a_phase_of_one_unit_moves_and_says_what_is_done(tmp_path, name):
    run = begun(tmp_path)
    journal = Journal(run, ignore)
    now = time.time()
    journal.emit("phase begins", unit=name, tokens=1, at=now)
    plan = json.loads(run.read("plan.json"))
    plan["forecast"]["phases"][name] = {"p10": 40.0, "p50": 50.0, "p90": 60.0}
    run.write("plan.json", json.dumps(plan).encode())
    with lease.held(run):
        snapshot = Watcher(run.uri).snapshot()
    shown = []
    for later in (3, 4):
        console = Console(
            width=80, color_system="truecolor", force_terminal=True, file=io.StringIO()
        )
        console.print(screen(snapshot, price=0.0, now=now + later, width=80))
        shown.append(console.file.getvalue())
    assert "3.00\N{NO-BREAK SPACE}s so far, planned 50.0\N{NO-BREAK SPACE}s" in shown[0]
    assert "a fresh process" in shown[0]
    bars = [next(line for line in each.splitlines() if name in line) for each in shown]
    assert bars[0].partition("0/1")[0] != bars[1].partition("0/1")[0]


def test_a_worker_over_its_plan_is_named_once_with_both_numbers(tmp_path):
    run = begun(tmp_path)
    journal = Journal(run, ignore)
    watcher = Watcher(run.uri)
    before = watcher.snapshot()
    assert "exceeds its plan" not in drawn(before, 120)
    for worker, peak in (("worker-2", 43 * 2**30), ("worker-5", 50 * 2**30)):
        journal.emit("layer", unit="layer-00000", worker=worker, start=1.0, peak_bytes=peak)
    journal.flush()
    after = watcher.snapshot()
    line = "worker-5 exceeds its plan: 42.9 GB planned, 53.7 GB measured (+25.0 %)"
    rows = drawn(after, 120).replace("\u00a0", " ").splitlines()
    assert [row.strip() for row in rows if "exceeds its" in row] == [line]
    for earlier, times in ((before, 1), (after, 0)):
        told = [text.replace("\u00a0", " ") for text in lines(earlier, after)]
        assert told.count(line) == times


def test_what_is_left_of_a_phase_follows_from_the_rate_so_far(tmp_path):
    run = begun(tmp_path)
    with lease.held(run):
        phase = Watcher(run.uri).snapshot().phase
    assert (phase.done, phase.total) == (20, 82)
    assert phase.seconds_left == pytest.approx(900 / 20 * 62, rel=0.01)


def test_what_is_left_of_the_run_is_this_phase_at_its_rate_and_the_others_at_the_pace_so_far(
    tmp_path,
):
    run = begun(tmp_path)
    with lease.held(run):
        left = Watcher(run.uri).snapshot().left
    # Calibration took twice what was expected. Both evaluations and the stitch are still to come.
    pace, rest = (2600 + WEIGHT) / (1300 + WEIGHT), 900 / 20 * 62
    assert left.p50 == pytest.approx(rest + (100 + 5) * pace, rel=0.01)
    assert left.p10 == pytest.approx(rest * 0.9 + (90 + 5) * pace, rel=0.01)
    assert left.p90 == pytest.approx(rest * 1.5 + (130 + 5) * pace, rel=0.01)


@pytest.mark.parametrize(
    ("ended", "phase", "left"),
    [
        ({}, None, 1300 + 100 + 1000 + 5),
        ({"calibrate": 1300.0, "evaluate": 50.0}, None, 50 + 1000 + 5),
        ({"calibrate": 650.0, "evaluate": 50.0}, None, 1055 * (650 + WEIGHT) / (1300 + WEIGHT)),
        ({"calibrate": 0.0}, None, 1105 * WEIGHT / (1300 + WEIGHT)),  # statistics were there
        ({"calibrate": 1300.0, "evaluate": 50.0, "compress": 1000.0, "stitch": 5.0}, None, 50),
        (dict.fromkeys(["calibrate", "evaluate", "compress", "stitch", "verify"], 1.0), None, 0),
        ({"calibrate": 1300.0}, ("evaluate", 20.0), 20 + 50 + 1000 + 5),
        ({"calibrate": 1300.0, "evaluate": 50.0}, ("compress", 7.0), 7 + 50 + 5),
    ],
)  # fmt: skip
def test_the_evaluation_comes_twice(ended, phase, left):
    now = phase and Phase(
        name=phase[0], done=1, total=9, begun=0.0, planned=0.0, tokens_per_second=0.0,
        seconds_left=phase[1],
    )  # fmt: skip
    assert time_left(FORECAST["phases"], ended, now).p50 == pytest.approx(left)


def test_of_several_steps_what_is_left_is_the_whole_less_what_was_spent(tmp_path):
    run = begun(tmp_path)
    plan = json.loads(run.read("plan.json"))
    plan["identity"]["steps"] = [{"method": "svdllm"}, {"method": "modegpt"}]
    plan["forecast"]["seconds"] = {"p10": 6000.0, "p50": 7000.0, "p90": 9000.0}
    run.write("plan.json", json.dumps(plan).encode())
    with lease.held(run):
        left = Watcher(run.uri).snapshot().left
    assert left.p50 == pytest.approx(7000 - 2600)
    assert left.p10 == pytest.approx(6000 - 2600)


def test_where_nothing_was_expected_nothing_is_said_to_be_left():
    assert time_left({}, {"calibrate": 1.0}, None) is None


def test_a_driver_that_is_gone_is_not_shown_as_running(tmp_path):
    run = begun(tmp_path)
    assert Watcher(run.uri).snapshot().verdict == "stopped"
    run.write("lease.json", json.dumps({
        "nonce": "n", "host": lease.socket.gethostname(), "pid": 2**22 + 1, "started": "1",
        "since": 0.0, "beat": 1,
    }).encode())  # fmt: skip
    snapshot = Watcher(run.uri).snapshot()
    assert snapshot.verdict == "stopped"
    assert "no longer runs" in snapshot.holder


def test_a_torn_plan_and_a_torn_event_file_are_read_when_they_are_whole(tmp_path):
    run = begun(tmp_path)
    whole = run.read("plan.json")
    run.write("plan.json", whole[:20])
    run.write("events/9.parquet", b"PAR1 torn")
    watcher = Watcher(run.uri)
    assert watcher.snapshot().layers == []
    run.write("plan.json", whole)
    assert len(watcher.snapshot().layers) == 80


def test_a_log_says_each_thing_once(tmp_path):
    run = begun(tmp_path)
    watcher = Watcher(run.uri)
    first = watcher.snapshot()
    said = list(lines(None, first))
    assert any("preempted worker-3" in line for line in said)
    assert said[-1].startswith("stopped ")
    assert list(lines(first, watcher.snapshot())) == []


def test_a_run_that_goes_on_is_seen_from_outside_while_it_does(tmp_path):
    """Look in the middle of a real run, from within its own listener."""
    seen = []
    out = tmp_path / "run"

    def look(event):
        if event["kind"] == "phase begins":
            with_lease = Watcher(str(out))
            seen.append(with_lease.snapshot().layers)

    compress_local(save_model(tmp_path / "model"), out, listener=look)
    assert [DONE] * 3 in seen
    assert seen[0] == [WAITING] * 3


@pytest.mark.slow
def test_the_command_prints_a_finished_run_and_leaves(tmp_path, capsys):
    out = tmp_path / "run"
    run_local(save_model(tmp_path / "model"), out)
    main(["watch", str(out)])
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"READY {out}"
    main(["watch", str(out), "--once"])
    assert "3 done" in capsys.readouterr().out


def test_where_there_is_no_run_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["watch", str(tmp_path)])
    assert left.value.code == 6
    assert "there is no run here" in capsys.readouterr().err
