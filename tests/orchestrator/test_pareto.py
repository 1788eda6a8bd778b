"""The page of a sweep: self-contained, says what pareto.json says, marks the front."""

import io
import re
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from rich.console import Console

from actors.storage.files import Directory
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli.experiments import print_sweep
from orchestrator.cli.main import cli
from orchestrator.experiments.sweep import Point, Wanted, exported, points_of, sweep_on, with_front
from orchestrator.phases.open_run import check_run, open_run
from orchestrator.report import render_pareto
from orchestrator.rundir.journal import read_events
from planners.errors import ConfigError
from tests.builders import VOCABULARY, prepared_run, save_model


def document(*points, dense=5.0):
    made = [
        Point(
            name=f"{method}-{kept}", method=method, asked=f"{kept}", keep_fraction=kept,
            parameters=int(1000 * kept), bytes=int(4000 * kept), predicted_error=0.1,
            perplexity=perplexity, seconds=1.0, options={}, line=method,
        )
        for method, kept, perplexity in points
    ]  # fmt: skip
    return {
        "model": "some/<model>",
        "over": "keep_fraction",
        "dense": {"perplexity": dense, "parameters": 1000, "bytes": 4000},
        "points": [asdict(point) for point in with_front(made)],
    }


SWEEPS = {
    "several": document(("a", 0.9, 5.5), ("b", 0.9, 6.0), ("a", 0.7, 7.0), ("b", 0.6, 9.0)),
    "one": document(("a", 0.9, 5.5)),
    "far apart": document(("a", 0.9, 5.5), ("b", 0.1, 1e5)),
    "better than dense": document(("a", 0.9, 4.5)),
    "none": document(),
}


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
def test_the_page_loads_nothing_and_names_every_point(sweep):
    page = render_pareto(sweep)
    elements = Elements()
    elements.feed(page)
    assert not {tag for tag, _ in elements.found} & {"script", "img", "iframe", "object"}
    for tag, attributes in elements.found:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "some/&lt;model&gt;" in page
    rows = re.findall(r'<tr><th scope="row"[^>]*>(.*?)</th>(.*?)</tr>', page)
    assert sorted(name for name, _ in rows) == sorted(p["name"] for p in sweep["points"])
    marked = {name for name, row in rows if ">front<" in row}
    assert marked == {p["name"] for p in sweep["points"] if p["on_front"]}
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "dense" in svg.lower()
        ElementTree.fromstring(svg)
    assert page == render_pareto(sweep)


def test_the_front_is_what_none_beats_in_size_and_perplexity():
    points = {p["name"]: p["on_front"] for p in SWEEPS["several"]["points"]}
    assert points == {"a-0.9": True, "b-0.9": False, "a-0.7": True, "b-0.6": True}


@pytest.mark.parametrize("width", [40, 80, 100])
def test_a_sweep_is_printed_with_whole_names_and_its_front_marked(monkeypatch, width):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    monkeypatch.setattr("orchestrator.cli.experiments.stdout", console)
    print_sweep("runs/x", SWEEPS["several"])
    said = console.file.getvalue().replace("\N{NO-BREAK SPACE}", " ")
    for point in SWEEPS["several"]["points"]:
        (line,) = [line for line in said.splitlines() if point["name"] in line.split()]
        assert ("front" in line.split()) == point["on_front"]
    for words in ("90.0 %", "7.000", "+40.0 %", "predicted error"):
        assert words in said
    assert all(len(line.rstrip()) <= width for line in said.splitlines()[1:-1])
    assert "runs/x/pareto.html" in said


METHODS = ["slicegpt", "modegpt", "svdllm"]


def wanted(names, *fractions, **options):
    return Wanted(names=names, sizes=[("keep_fraction", f) for f in fractions], options=options)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Do a sweep of three methods at two sizes; return its base, its points and what it wrote."""
    folder = tmp_path_factory.mktemp("swept")
    base = prepared_run(
        save_model(folder / "model"), folder / "run", method="slicegpt", keep_fraction=0.9
    )
    points = points_of(base, wanted(METHODS, 0.9, 0.8, allocation="uniform"))
    return base, points, sweep_on(base, points, LocalExecutor(), listener=lambda _: None)


def test_a_sweep_writes_its_page(swept):
    base, _, found = swept
    assert base.run.read("pareto.html").decode() == render_pareto(found)
    assert {p["name"] for p in found["points"]} == {
        f"{name}-{size}" for name in METHODS for size in (0.9, 0.8)
    }
    assert all(1 < p["perplexity"] < 9 * VOCABULARY for p in found["points"])


def test_a_sweep_calibrates_once_and_measures_the_dense_model_once(swept):
    base, points, _ = swept

    def passes(run):
        """Return what a run passed microbatches for."""
        return {
            "evaluation-compressed" if "compressed" in e["unit"] else f"{e['kind']} dense"
            for e in read_events(run)
            if e["kind"] in ("calibrate", "evaluate")
        }

    assert passes(base.run) == {"calibrate dense", "evaluate dense"}
    for point in points:
        assert passes(point.run) == {"evaluation-compressed"}


def test_a_point_is_exported_from_its_own_recipe(swept):
    base, points, _ = swept
    again = exported(base.run, "svdllm-0.8")
    assert again.facts == points[-1].facts
    assert check_run(again)
    with pytest.raises(ConfigError, match=r"there is no such point; did you mean svdllm-0\.8"):
        exported(base.run, "svdlm-0.8")
    with pytest.raises(ConfigError, match="has no sweep"):
        exported(points[0].run, "svdllm-0.8")


def test_a_point_that_cannot_be_done_is_refused_before_anything_is_calibrated(tmp_path):
    model = save_model(tmp_path / "model")
    base = prepared_run(model, tmp_path / "run", method="slicegpt", keep_fraction=0.9)
    open_run(base)
    (point,) = points_of(base, wanted(["slicegpt"], 0.8))
    open_run(prepared_run(model, point.config.out, method="svdllm", keep_fraction=0.7))
    with pytest.raises(ConfigError, match=r"points/slicegpt-0\.8 holds a different run"):
        sweep_on(base, [point], LocalExecutor(), listener=lambda _: None)
    assert not read_events(Directory(base.config.out))


def test_a_sweep_after_layers_were_redone_makes_points_without_their_options(tmp_path):
    base = prepared_run(
        save_model(tmp_path / "model"), tmp_path / "run", method="modegpt", keep_fraction=0.9,
        layer_options={1: {"ridge": 0.5}},
    )  # fmt: skip
    points = points_of(base, wanted(["modegpt", "svdllm"], 0.8))
    assert [point.config.layer_options for point in points] == [{}, {}]


def test_a_front_over_bytes_does_not_ask_how_many_parameters_are_kept():
    sweep = document(("a", 0.9, 6.0), ("b", 1.0, 5.0))
    points = [Point(**{**p, "bytes": 100, "bits": 4.5, "asked": "4/32", "line": "uniform"})
              if p["method"] == "b" else Point(**p) for p in sweep["points"]]  # fmt: skip
    found = {p.name: p.on_front for p in with_front(points, over="bytes")}
    assert found == {"a-0.9": False, "b-1.0": True}
    page = render_pareto({**sweep, "over": "bytes", "points": [asdict(p) for p in points]})
    assert "stroke-dasharray" in page
    assert "weights as stored" in page
    assert "4/32" in page


@pytest.mark.slow
def test_a_sweep_in_bytes_shares_sums_and_curves_and_draws_uniform_schemes(tmp_path):
    model = save_model(tmp_path / "model", intermediate_size=64, num_hidden_layers=2)
    base = prepared_run(model, tmp_path / "run", method="modegpt", keep_fraction=0.9)
    points = points_of(base, Wanted(
        names=["modegpt"], sizes=[("keep_bytes", "14kB"), ("keep_bytes", "16kB")],
        options={"schemes": "4/32,8/32", "grid": "0.5"}, uniform=["4/32", "8/row"],
        dtype="bfloat16",
    ))  # fmt: skip
    found = sweep_on(base, points, LocalExecutor(), listener=lambda _: None)
    by_name = {point["name"]: point for point in found["points"]}
    assert found["over"] == "bytes"
    assert set(by_name) == {"modegpt-14kB", "modegpt-16kB", "gptq-4bit-g32", "gptq-8bit-row"}
    assert by_name["modegpt-14kB"]["bytes"] <= 14_000
    assert by_name["modegpt-14kB"]["bytes"] < by_name["modegpt-16kB"]["bytes"] <= 16_000
    assert by_name["gptq-4bit-g32"]["line"] == "uniform"
    assert by_name["gptq-4bit-g32"]["bits"] == 4.5
    phases = [e["unit"] for e in read_events(base.run) if e["kind"] == "phase begins"]
    assert (phases.count("calibrate"), phases.count("allocate")) == (1, 1)
    measured = {e["unit"] for e in read_events(base.run) if e["kind"] == "damage"}
    assert len(measured) == 2
    for point in points:
        assert not [e for e in read_events(point.run) if e["kind"] in ("damage", "calibrate")]


def test_sizes_of_two_kinds_are_refused_and_so_is_a_sweep_of_nothing():
    for given in (
        ["--method", "modegpt", "--keep-bytes", "1GB", "--bits", "3"],
        ["--method", "modegpt"],
        ["--keep-bytes", "1GB"],
        [],
    ):
        with pytest.raises(ConfigError, match=r"give only one|give --method"):
            CliRunner().invoke(cli, ["sweep", "nowhere", *given], catch_exceptions=False)
