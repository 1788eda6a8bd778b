"""The page of a sweep: self-contained, says what pareto.json says, marks the front."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from orchestrator.backend.local import LocalExecutor
from orchestrator.experiments.sweep import Point, _plain, points_of, sweep_on, with_front
from orchestrator.report import render_pareto
from tests.builders import prepared_run, save_model


def document(*points, dense=5.0):
    made = [
        Point(
            name=f"{method}-{kept}", method=method, asked=kept, keep_fraction=kept,
            parameters=int(1000 * kept), predicted_error=0.1, perplexity=perplexity, seconds=1.0,
            options={},
        )
        for method, kept, perplexity in points
    ]  # fmt: skip
    return {
        "model": "some/<model>",
        "dense": {"perplexity": dense, "parameters": 1000},
        "points": [_plain(point) for point in with_front(made)],
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


def test_a_sweep_writes_its_page(tmp_path):
    model = save_model(tmp_path / "model")
    base = prepared_run(model, tmp_path / "run", method="slicegpt", keep_fraction=0.9)
    points = points_of(base, ["slicegpt", "modegpt", "svdllm"], [0.8], {"allocation": "uniform"})
    found = sweep_on(base, points, LocalExecutor(), listener=lambda _: None)
    page = (tmp_path / "run" / "pareto.html").read_text()
    assert page == render_pareto(found)
    assert {p["method"] for p in found["points"]} == {"slicegpt", "modegpt", "svdllm"}
