"""A sweep as a self-contained HTML page: perplexity by size and method, with the Pareto front."""

import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from orchestrator.report import numbers
from orchestrator.report.document import Document
from orchestrator.report.quality import judged
from orchestrator.report.svg import (
    BEFORE,
    INK,
    KIND_COLOURS,
    SURFACE,
    Plot,
    Sheet,
    Words,
    draw,
    label,
)

_SHAPES = (("o", "dot"), ("s", "square"), ("D", "diamond"))
_WIDE_RANGE = 3.0  # of perplexities: from here on the scale is logarithmic
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
    points = sorted(sweep["points"], key=lambda p: (-p["keep_fraction"], p["perplexity"]))
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
            )
            for p in points
        ],
        best=[point for point in points if point["on_front"]],
        plot=front(points, dense=dense) if points else None,
        numbers=numbers,
    )


def front(points: Sequence[dict[str, Any]], *, dense: float) -> Plot:
    """Return a plot of perplexity over the true fraction kept, one line per method."""
    names = sorted({point["method"] for point in points})
    looks = {
        name: (KIND_COLOURS[i % len(KIND_COLOURS)], *_SHAPES[i % len(_SHAPES)])
        for i, name in enumerate(names)
    }
    best = [point for point in points if point["on_front"]]
    listed = "; ".join(
        f"{p['name']} keeps {numbers.percent(p['keep_fraction'])} "
        f"at {numbers.decimal(p['perplexity'])}"
        for p in best
    )
    words = Words(
        key="front",
        title="Perplexity over size",
        description=f"Dense perplexity {numbers.decimal(dense)}. On the front: {listed}.",
        caption="Lower and further left is better. A ringed point is on the Pareto front: no other "
        "point of its size or smaller is as good. Size is the true fraction of parameters kept.",
        legend=(
            *((label(name), looks[name][0], looks[name][2]) for name in names),
            ("dense", BEFORE, "line"),
            ("front", INK, "line"),
        ),
    )

    def paint(sheet: Sheet) -> None:
        axes = sheet.figure.subplots()
        axes.grid(axis="y")
        axes.axhline(dense, color=BEFORE, linewidth=1.6)
        axes.plot(*_xy(best), color=INK, linewidth=0.9)
        axes.plot(
            *_xy(best), "o", markersize=_RING, markerfacecolor=SURFACE, markeredgecolor=INK,
            markeredgewidth=1.1, zorder=3,
        )  # fmt: skip
        for name, (colour, marker, _) in looks.items():
            mine = [point for point in points if point["method"] == name]
            axes.plot(
                *_xy(mine), color=colour, marker=marker, markersize=_POINT, linewidth=1.1, zorder=4
            )
        _scale(axes, [dense, *(point["perplexity"] for point in points)])

    return draw(words, paint, height=lambda narrow: 2.9 if narrow else 3.6)


def _xy(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    ordered = sorted(points, key=lambda p: p["keep_fraction"])
    return [p["keep_fraction"] * 100 for p in ordered], [p["perplexity"] for p in ordered]


def _scale(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xlabel("parameters kept, %")
    axes.set_ylabel("perplexity")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, min_n_ticks=2))
    plain = FuncFormatter(lambda y, _: f"{y:,.4g}")
    axes.margins(x=0.04, y=0.08)
    if min(values) > 0 and max(values) / min(values) > _WIDE_RANGE:
        axes.set_yscale("log")
        few = math.log10(max(values) / min(values)) < 2  # noqa: PLR2004 decades
        steps = (1.0, 2.0, 3.0, 5.0) if few else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(plain)
