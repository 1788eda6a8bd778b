"""Many runs as one: one calibration for what shares model and text, a budget, a table, a resume."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from actors.storage.files import Directory
from orchestrator.backend.local import LocalExecutor
from orchestrator.backend.ray_cluster import ClusterFacts
from orchestrator.cli.experiments import batch as batch_command
from orchestrator.cli.main import main
from orchestrator.experiments import batch as batches
from orchestrator.experiments.batch import Row, Spent, do_batch
from orchestrator.experiments.batch_file import Budget, read_batch
from orchestrator.phases.open_run import open_run
from orchestrator.run import run_on
from orchestrator.rundir.journal import read_events
from planners.errors import CompressionError, ConfigError, ModelError
from tests.builders import LENGTH, compress_local, result_files, run_local, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def in_process(monkeypatch):
    """Do each run in this process, on the same path but for Ray."""

    def run_here(prepared, *, listener, **_):
        open_run(prepared)
        return run_on(prepared, LocalExecutor(), listener=listener)

    monkeypatch.setattr(batches, "run", run_here)


def entry_of(model, **values):
    tokens = f"tokens:{model}/tokens"
    return {
        "model": str(model),
        "device": "cpu",
        "calibration": {
            "source": f"{tokens}/calibration.safetensors",
            "microbatch_tokens": 4 * LENGTH,
        },
        "evaluation": {"source": f"{tokens}/evaluation.safetensors"},
        **values,
    }


def write(tmp_path, runs, **document):
    path = tmp_path / "batch.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "runs": runs, **document}))
    return str(path)


def ignore(_):
    pass


def calibrations(out):
    return [
        folder.name
        for folder in sorted(out.iterdir())
        if folder.is_dir()
        and any(e["kind"] == "calibrate" for e in read_events(Directory(str(folder))))
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_two_models_at_two_sizes_take_two_calibrations_and_give_the_bytes_of_runs_alone(
    models, tmp_path
):
    runs = [entry_of(m, keep_fraction=[0.9, 0.7], method="modegpt") for m in models]
    path = write(tmp_path, runs)
    started = []
    rows = do_batch(read_batch(path), listener=ignore, on_run=lambda e: started.append(e.name))
    out = tmp_path / "out"
    assert [row.state for row in rows] == ["READY"] * 4
    assert len(calibrations(out)) == 2
    assert [row.calibration for row in rows].count("own") == 2
    assert all(row.perplexity > 0 and row.dense_perplexity > 0 for row in rows)
    assert not Directory(str(out / rows[0].name)).names("stats")  # nobody needs them any more

    alone = tmp_path / "alone"
    compress_local(models[1], alone, keep_fraction=0.7, method="modegpt")
    assert result_files(out / "two-modegpt-keep0.7") == result_files(alone)

    again = []
    second = do_batch(read_batch(path), listener=ignore, on_run=again.append)
    assert again == []
    assert [(r.name, r.perplexity, r.calibration) for r in second] == [
        (r.name, r.perplexity, r.calibration) for r in rows
    ]


def test_a_dry_run_says_what_the_runs_come_to_and_that_only_one_of_them_calibrates(
    models, tmp_path, capsys
):
    runs = [entry_of(models[0], keep_fraction=[0.9, 0.8], method="modegpt")]
    budget = {"hours": 1, "price_per_worker_hour": 2.0}
    path = write(tmp_path, runs, budget=budget)
    main(["batch", path, "--dry-run", "--json"])
    first, second = (run["expected"] for run in json.loads(capsys.readouterr().out)["runs"])
    assert first["flops"]["calibrate"] > 0
    assert not second["flops"].get("calibrate")
    assert first["money"]["p50"] == pytest.approx(first["seconds"]["p50"] / 3600 * 2)
    main(["batch", path, "--dry-run"])
    said = capsys.readouterr().out
    assert "2 runs are left: about " in said
    assert ", cost about " in said


@pytest.mark.parametrize("width", [40, 80])
def test_a_dry_run_breaks_no_name_and_no_number_on_a_narrow_terminal(
    models, tmp_path, monkeypatch, width
):
    names = [f"a-run-with-a-name-of-words-{n}" for n in (1, 2)]
    runs = [entry_of(models[0], keep_fraction=0.9 / n, method="svdllm", out=name)
            for n, name in enumerate(names, start=1)]  # fmt: skip
    path = write(tmp_path, runs)
    console = Console(width=width, file=io.StringIO(), highlight=False)
    monkeypatch.setattr("orchestrator.cli.experiments.stdout", console)
    main(["batch", path, "--dry-run"])
    said = console.file.getvalue().replace("\N{NO-BREAK SPACE}", "_")
    lines = [line.rstrip() for line in said.splitlines() if str(tmp_path) not in line]
    assert all(len(line) <= width for line in lines)
    assert [word for word in said.split() if word.startswith("a-run")] == names
    assert len(re.findall(r"\d_s|\d_min \d\d_s", said)) == 3  # of each, and of both
    assert ("run " in lines[0]) == (width == 80)  # a table where it fits


def test_a_finished_run_is_shown_with_its_quality_and_the_digits_of_its_report(
    models, tmp_path, monkeypatch
):
    path = write(tmp_path, [entry_of(models[0], keep_fraction=0.9, method="svdllm")])
    row = Row(name="one", state="READY", keep_fraction=0.798, dense_perplexity=2.547,
              perplexity=8.5, quality="usual for this size", tone="cost", seconds=61.0)  # fmt: skip
    monkeypatch.setattr("orchestrator.cli.experiments.table_of", lambda _: [row])
    console = Console(width=100, file=io.StringIO(), highlight=False)
    monkeypatch.setattr("orchestrator.cli.experiments.stdout", console)
    main(["batch", path, "--dry-run"])
    said = console.file.getvalue().replace("\N{NO-BREAK SPACE}", " ")
    for words in ("79.8 %", "8.500", "+233.7 %", "usual for this size", "1 min 01 s"):
        assert words in said


@pytest.mark.parametrize(("budget", "asked"), [({"hours": 1}, 1), ({"money": 5}, 0)])
def test_a_batch_is_asked_about_once_unless_its_budget_is_the_answer(
    models, tmp_path, monkeypatch, capsys, budget, asked
):
    runs = [entry_of(models[0], keep_fraction=[0.9, 0.8], method="modegpt", address="10.0.0.1:1")]
    path = write(tmp_path, runs, budget={**budget, "price_per_worker_hour": 2.0})
    visited = []

    @contextlib.contextmanager
    def connected(address, **_):
        visited.append(address)
        yield ClusterFacts(
            address=address, num_nodes=1, cpus=8.0, gpus=0.0, spot=False, dashboard=""
        )

    monkeypatch.setattr("orchestrator.cli.consent.connected", connected)
    monkeypatch.setattr("orchestrator.cli.experiments.do_batch", lambda *_, **__: [])
    if asked:
        with pytest.raises(SystemExit) as refused:
            main(["batch", path])
        assert refused.value.code == 2
        assert "may cost money (2 runs are left: about " in capsys.readouterr().err
        main(["batch", path, "--yes"])
    else:
        main(["batch", path])
    assert set(visited) == {"10.0.0.1:1"}


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_budget_stops_in_the_middle_and_a_larger_one_goes_on(models, tmp_path):
    runs = [entry_of(models[0], slice=[0.25, 0.5])]
    tight = write(tmp_path, runs, budget={"hours": 1e-5})  # 36 ms
    rows = do_batch(read_batch(tight), listener=ignore, on_run=ignore)
    assert [row.state for row in rows] == ["waiting", "waiting"]
    kept = json.loads((tmp_path / "out/batch.json").read_text())["spent"]["seconds"]
    assert kept >= 0.036
    rows = do_batch(
        read_batch(write(tmp_path, runs, budget={"hours": 1})), listener=ignore, on_run=ignore
    )
    assert [row.state for row in rows] == ["READY", "READY"]
    assert json.loads((tmp_path / "out/batch.json").read_text())["spent"]["seconds"] > kept


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_run_that_fails_stops_no_other_and_is_tried_again(models, tmp_path, monkeypatch, capsys):
    path = write(tmp_path, [entry_of(models[0], slice=[0.25, 0.5], method="slicegpt")])
    well, broken = batches.run, []

    def fails_once(prepared, *, listener, **_):
        if prepared.config.slice == 0.25 and not broken:
            broken.append(True)
            raise ModelError("layer 1 is not finite")
        return well(prepared, listener=listener)

    monkeypatch.setattr(batches, "run", fails_once)
    with pytest.raises(CompressionError, match="1 of 2 runs failed"):
        batch_command(path, dry_run=False, yes=False, json_=True)
    table = json.loads(capsys.readouterr().out)["runs"]
    assert [row["state"] for row in table] == ["failed", "READY"]
    assert table[0]["error"] == "ModelError: layer 1 is not finite"
    batch_command(path, dry_run=False, yes=False, json_=True)
    table = json.loads(capsys.readouterr().out)["runs"]
    assert [row["state"] for row in table] == ["READY", "READY"]
    assert table[0]["calibration"] == "one-slicegpt-slice0.5"


def test_a_mistake_in_entry_5_is_refused_before_entry_1_starts(models, tmp_path):
    good = [entry_of(models[0], slice=s) for s in (0.1, 0.25, 0.3, 0.5)]
    path = write(tmp_path, [*good, entry_of(models[0], slice=0.25, methd="slicegpt")])
    with pytest.raises(ConfigError, match="runs, entry 5: methd: unknown key; did you mean method"):
        read_batch(path)
    path = write(tmp_path, [*good, entry_of(tmp_path / "nothing", slice=0.25)])
    with pytest.raises(ModelError, match="runs, entry 5: "):
        read_batch(path)
    assert not (tmp_path / "out").exists()


def test_higher_priorities_come_first_and_runs_of_one_model_stay_together(models, tmp_path):
    one, two = models
    runs = [entry_of(one, slice=0.25), entry_of(two, slice=0.25), entry_of(one, slice=0.5),
            entry_of(two, slice=0.5, priority=1)]  # fmt: skip
    names = [entry.name for entry in read_batch(write(tmp_path, runs)).entries]
    assert names == [
        "two-slicegpt-slice0.5", "one-slicegpt-slice0.25", "one-slicegpt-slice0.5",
        "two-slicegpt-slice0.25",
    ]  # fmt: skip


def test_money_is_spent_by_workers_and_hours_by_the_clock():
    budget = Budget(hours=2, money=8, price_per_worker_hour=1)
    assert budget.left(Spent()) == 1
    assert budget.left(Spent(seconds=3600, worker_seconds=3600)) == 0.5
    assert budget.left(Spent(seconds=3600, worker_seconds=8 * 3600)) == 0


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"rums": []}, "rums: unknown key"),
        ({"budget": {"money": 5}}, "price_per_worker_hour"),
        ({"budget": {"hours": -1}}, "budget.hours"),
        ({"budget": {"days": 1}}, "budget: must be"),
        ({"runs": []}, "runs: must be a list"),
        ({"runs": ["tiny"]}, "entry 1"),
        ({"runs": [{"priority": "high"}]}, "priority"),
        ({"runs": [{"stats": "x"}]}, "stats"),
        ({"runs": [{"slice": [0.1, 0.2], "out": "x"}]}, "names one directory"),
        ({"runs": [{"model": "tiny", "slice": 0.2}, {"model": "tiny", "slice": 0.2}]}, "already"),
        ({"out": ""}, "out: must be"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(document, said, tmp_path):
    path = tmp_path / "batch.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "o"), "runs": [{}], **document}))
    with pytest.raises(ConfigError, match=said):
        read_batch(str(path))


@pytest.mark.ray
@pytest.mark.nightly
def test_on_three_nodes_of_which_two_die_there_are_two_calibrations_and_the_same_bytes(
    models, tmp_path
):
    how = {"method": "modegpt", "address": "ADDRESS"}
    path = write(tmp_path, [entry_of(m, keep_fraction=[0.9, 0.8, 0.7], **how) for m in models])
    done = subprocess.run(
        [sys.executable, "-m", "tests.orchestrator.three_nodes", path],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"taken": 2, "states": ["READY"] * 6}
    out = tmp_path / "out"
    assert len(calibrations(out)) == 2
    alone = tmp_path / "alone"
    run_local(models[1], alone, keep_fraction=0.7, method="modegpt")
    assert result_files(out / "two-modegpt-keep0.7") == result_files(alone)
