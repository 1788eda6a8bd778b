"""A sweep as a self-contained HTML page: perplexity by size and method, with the Pareto front."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.report import numbers
from orchestrator.report.document import Document
from orchestrator.report.quality import judged
from orchestrator.report.svg import (
    BEFORE,
    CUT,
    INK,
    KIND_COLOURS,
    Panel,
    Plot,
    Sheet,
    Words,
    draw,
    label,
    span_axis,
    ticks,
    widened,
)

UNIFORM = "uniform"  # the line of points with one scheme for all linears
_SHAPES = ("dot", "square", "diamond")
_POINT, _RING = 5.0, 11.0


def render_pareto(sweep: Document) -> str:
    """Return the HTML page of the document in ``pareto.json``."""
    environment = Environment(
        loader=PackageLoader("orchestrator.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup
    dense = sweep["dense"]["perplexity"]
    over = str(sweep["over"])
    points = sorted(sweep["points"], key=lambda p: (-p[over], p["perplexity"]))
    return environment.get_template("pareto.html.jinja").render(
        model=str(sweep["model"]),
        dense=dense,
        parameters=sweep["dense"]["parameters"],
        points=points,
        qualities=[
            judged(
                dense,
                p["perplexity"],
                kept=p["keep_fraction"],
                parameters=sweep["dense"]["parameters"],
                names=[p["method"]],
                bits=p["bits"],
            )
            for p in points
        ],
        best=[point for point in points if point["on_front"]],
        over=over,
        size=sweep["dense"]["bytes"],
        plot=front(points, dense=dense, over=over) if points else None,
        numbers=numbers,
    )


def front(points: Sequence[dict[str, Any]], *, dense: float, over: str) -> Plot:
    """Return a plot of perplexity over size, one line per method and one of uniform schemes.

    Args:
        points: of the sweep.
        dense: perplexity of the dense model.
        over: what size is: ``keep_fraction`` or ``bytes``.
    """
    names = sorted({point["line"] for point in points} - {UNIFORM})
    looks = {
        name: (KIND_COLOURS[i % len(KIND_COLOURS)], _SHAPES[i % len(_SHAPES)])
        for i, name in enumerate(names)
    }
    if any(point["line"] == UNIFORM for point in points):
        looks[UNIFORM] = (CUT, "diamond")
    best = [point for point in points if point["on_front"]]
    listed = "; ".join(
        f"{p['name']}, {_size_text(p, over)}, at {numbers.decimal(p['perplexity'])}" for p in best
    )
    what = {
        "bytes": "Size is the bytes of all tensors as stored.",
        "keep_fraction": "Size is the true fraction of parameters kept.",
    }[over]
    if UNIFORM in looks:
        what += " The dashed line has the same bits and group in all linears: what is to be beaten."
    words = Words(
        key="front",
        title="Perplexity over size",
        description=f"Dense perplexity {numbers.decimal(dense)}. On the front: {listed}.",
        caption="Lower and further left is better. A ringed point is on the Pareto front: no other "
        f"point of its size or smaller is as good. {what}",
        legend=(
            *((label(name), *looks[name]) for name in looks),
            ("dense", BEFORE, "line"),
            ("front", INK, "line"),
        ),
    )

    def paint(sheet: Sheet) -> None:
        panel = sheet.panel()
        _scale(panel, points, dense, over)
        panel.across(dense, BEFORE, width=1.6)
        panel.line(_xy(best, over), INK, width=0.9)
        panel.markers(_xy(best, over), "dot", _RING, INK, ring=True)
        for name, (colour, shape) in looks.items():
            mine = _xy([point for point in points if point["line"] == name], over)
            panel.line(mine, colour, width=1.1, dashed=name == UNIFORM)
            panel.markers(mine, shape, _POINT, colour)

    return draw(words, paint, height=lambda narrow: 2.9 if narrow else 3.6)


def _size_text(point: dict[str, Any], over: str) -> str:
    if over == "bytes":
        return numbers.bytes_text(point["bytes"])
    return f"keeping {numbers.percent(point['keep_fraction'])}"


def _xy(points: Sequence[dict[str, Any]], over: str) -> list[tuple[float, float]]:
    ordered = sorted(points, key=lambda p: p[over])
    return [(float(p[over]), p["perplexity"]) for p in ordered]


def _scale(panel: Panel, points: Sequence[dict[str, Any]], dense: float, over: str) -> None:
    places, values = zip(*_xy(points, over), strict=True)
    panel.x_limits = widened(min(places), max(places), 0.06)
    if over == "bytes":
        panel.x_ticks = [(x, numbers.bytes_text(x)) for x in ticks(panel.x_limits, most=5)]
        panel.x_label = "weights as stored"
    else:
        panel.x_ticks = [(x, f"{100 * x:.6g}") for x in ticks(panel.x_limits, most=8)]
        panel.x_label = "parameters kept, %"
    panel.y_label = "perplexity"
    span_axis(panel, [dense, *values])
