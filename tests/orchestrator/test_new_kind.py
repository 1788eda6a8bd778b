"""A kind of unit is one row and one function: all that counts, draws or plans units knows it."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from actors.layer_units.reads import Reads
from actors.layer_units.registry import FUNCTIONS, do_unit
from actors.messages import CompressionJob, UnitTask
from actors.storage.files import Directory
from actors.storage.records import Record, write_record
from orchestrator.backend.metrics import Meters
from orchestrator.cli.progress import ProgressScreen
from orchestrator.cli.status import status
from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.pricing import Devices, Pricing
from orchestrator.recipe.reading import load_config
from orchestrator.remote.snapshot import Watcher
from orchestrator.report import timeline
from orchestrator.report.document import Span
from orchestrator.rundir import lease
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.ledger import Ledger
from planners.errors import PlanError
from planners.simulation.timetable import CostModel, Sample, download_bytes, phase_work, timetable
from planners.units.kinds import DONE, KINDS, WAITING, UnitKind, kinds_of
from planners.units.units import Unit, compression_units
from planners.units.work import KINDS as KINDS_OF_WORK
from planners.units.work import Work

HUGE = 2**50
ROW = UnitKind(
    name="prune", stem="prune-layer", phase="compress", state=DONE, reusable=True, reads="layer",
    colour=3, work=lambda _job, index: Work(matmul=1e15, calls=index),
)  # fmt: skip


@pytest.fixture
def prune(monkeypatch):
    monkeypatch.setitem(KINDS, "prune", ROW)
    monkeypatch.setitem(FUNCTIONS, "prune", lambda task, *_: ((), {"pruned": task.index}))
    return ROW


def event(**facts):
    empty = {"unit": "", "worker": "", "start": 0.0, "seconds": 0.0, "tokens": 0, "detail": ""}
    return {**empty, "at": 0.0, "peak_bytes": 0, "written_bytes": 0, **facts}


def work_on(layer):
    return event(kind="prune", unit=ROW.unit(layer), worker="worker-0", start=5.0, seconds=2.0)


def a_job():
    config = load_config(
        None, {"model": "llama-2-7b", "out": "unused", "method": "modegpt", "keep_fraction": 0.8}
    )
    return forecast(config, Devices(count=2, name="H100", bytes=80 * 10**9), Pricing()).job


def test_a_worker_does_it(prune):
    job = a_job()
    asked = CompressionJob(
        run_uri="", checkpoint_uri="", method="modegpt", options={}, shape=job.shape, form=job.form,
        tokens="", batching=job.data,
    )  # fmt: skip
    task = UnitTask(unit=prune.unit(3), kind="prune", index=3, inputs=())
    assert do_unit(task, asked, run=Directory("unused"), reads=Reads("cpu")) == ((), {"pruned": 3})


@pytest.mark.usefixtures("prune")
def test_the_progress_line_counts_it_and_each_of_its_layers_once():
    written = io.StringIO()
    with ProgressScreen(Console(file=written, width=120), num_workers=1) as screen:
        screen(event(kind="phase begins", unit="compress", tokens=3))
        for layer in (0, 1, 1):
            screen(work_on(layer))
        screen(event(kind="phase ends", unit="compress", seconds=1.0))
        assert screen._rate(1.0) == "2 layers · 1 worker"
    assert "compress: done in 1.0 s" in written.getvalue()


def begun(folder):
    run = Directory(str(folder))
    run.write("plan.json", json.dumps({"plan": {"shape": {"num_layers": 3}}}).encode())
    write_record(run, Record(unit=ROW.unit(1), fingerprint="f"))
    return run


def test_watch_and_status_show_its_layer_as_done(prune, tmp_path, capsys):
    run = begun(tmp_path)
    journal = Journal(run, lambda _: None)
    journal.emit("phase begins", unit="run")
    journal.emit("phase begins", unit="compress", tokens=3)
    journal.emit(**{key: value for key, value in work_on(1).items() if key != "at"})
    journal.flush()
    with lease.held(run):
        snapshot = Watcher(run.uri).snapshot()
    assert snapshot.layers == [WAITING, DONE, WAITING]
    assert (snapshot.phase.name, snapshot.phase.done) == ("compress", 1)
    assert snapshot.workers[0].unit == prune.unit(1)
    status(run.uri, json_=False)
    assert "prune  1 of 3" in capsys.readouterr().out


def test_status_counts_units_under_their_names_without_numbers(tmp_path, capsys):
    run = begun(tmp_path)
    names = (
        "stream-site-00000-shard-00000",
        "stream-site-00000-shard-00001",
        "boundary-layer-00001-mb-00000",
        "shard-00000-layer-00001",
        "shard-00001-layer-00001",
        "evaluation-dense-part-00000",
        "damage-svdllm-layer-00000",
        "layer-00002",
        "basis-site-00000",
        "stitch",
    )
    for name in names:
        write_record(run, Record(unit=name, fingerprint="f"))
    status(run.uri, json_=True)
    assert json.loads(capsys.readouterr().out)["done"] == {
        "basis": 1,
        "boundary": 1,
        "damage-svdllm": 1,
        "evaluation-dense": 1,
        "layer": 1,
        "prune": 1,
        "shard": 2,
        "stitch": 1,
        "stream": 2,
    }


def test_another_run_may_take_it(prune, tmp_path):
    begun(tmp_path / "other")
    unit = Unit(name=prune.unit(1), kind="prune", index=1, inputs=(), fingerprint="f")
    own, other = Directory(str(tmp_path / "own")), Directory(str(tmp_path / "other"))
    assert Ledger(own, reuse=other).done(unit)
    assert not Ledger(own).done(unit)


def test_the_timeline_draws_it_in_its_colour(prune):
    span = Span(worker="worker-0", unit=prune.unit(0), kind="prune", start=0.0, end=2.0)
    assert timeline.slot_of("prune") == prune.colour
    assert timeline.by_kind([span]) == [("prune", 1, 2.0)]
    assert f"var(--kind-{prune.colour})" in timeline.workers([span], []).wide


@pytest.mark.usefixtures("prune")
def test_the_metrics_count_its_layer_as_done():
    meters = Meters((), price_per_hour=0.0)
    meters(work_on(0))
    meters({**work_on(0), "kind": "damage"})
    assert meters._counts["layers"] == 1


def test_a_plan_refuses_workers_that_cannot_hold_it(prune, monkeypatch):
    assert a_job().plan.num_workers == 2
    monkeypatch.setitem(KINDS, "prune", replace(prune, peak_bytes=lambda _: HUGE))
    with pytest.raises(PlanError, match="too small for one layer"):
        a_job()


def test_the_forecast_has_its_time_its_spread_its_work_and_what_it_downloads(prune, monkeypatch):
    job = replace(a_job(), from_hub=True)
    without, loaded = phase_work(job)["compress"], download_bytes(job)

    def made(*args, **options):
        units = compression_units(*args, **options)
        return [*units, replace(units[0], kind="prune", name=prune.unit(0))]

    monkeypatch.setattr("planners.simulation.timetable.compression_units", made)
    one = Sample(seconds=7.0, spread=0.9, work=prune.work(job, 0))
    clock = CostModel(rates=Work(**dict.fromkeys(KINDS_OF_WORK, 1e12)), samples={"prune": one})
    (phase,) = [phase for phase in timetable(job, clock) if phase.name == "compress"]
    assert phase.seconds[prune.unit(0)] >= one.seconds
    assert clock.spread_of(*kinds_of("compress", many=True)) == one.spread
    assert phase_work(job)["compress"].matmul == without.matmul + 1e15
    assert download_bytes(job) > loaded
