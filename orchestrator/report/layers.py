"""Plots of what every layer lost: parameters, widths, and error on the probe."""

import math
from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.report.document import Layer
from orchestrator.report.numbers import (
    between,
    count,
    counted,
    decimal,
    percent,
    quotient,
    short_tick,
)
from orchestrator.report.svg import (
    BEFORE,
    KEPT,
    MUTED,
    Plot,
    Sheet,
    Words,
    draw,
    label,
    number_axis,
)

_BAR = 0.72
_SHORTCUTS = " Shortcut matrices count as stored parameters."
_MAX_WIDTHS = 8
_MANY = 24
_BY_FOUR = (4, 7, 8)


def parameters(layers: Sequence[Layer]) -> Plot | None:
    """Return a plot of the parameters of every layer before and after."""
    if not any(layer.before for layer in layers):
        return None
    fractions = [quotient(layer.after, layer.before) or 0.0 for layer in layers]
    before, after = sum(x.before for x in layers), sum(x.after for x in layers)
    kept = f"{between(percent(min(fractions)), percent(max(fractions)))} of their parameters"
    is_sliced = any("residual" in layer.widths and _cut(layer, "residual") for layer in layers)
    words = Words(
        key="parameters",
        title="Parameters per layer",
        description=f"{counted(len(layers), 'layer')} keep {kept}, {count(after)} of "
        f"{count(before)} in total.",
        caption=f"Layers keep {kept}, without embedding and head." + _SHORTCUTS * is_sliced,
        legend=(("before", BEFORE, "box"), ("after", KEPT, "box")),
    )

    def paint(sheet: Sheet) -> None:
        axes = sheet.figure.subplots()
        axes.grid(axis="y")
        positions = [layer.index for layer in layers]
        axes.bar(positions, [layer.before for layer in layers], _BAR, color=BEFORE)
        axes.bar(positions, [layer.after for layer in layers], _inner(layers), color=KEPT)
        number_axis(axes, positions)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short_tick(y)))
        axes.set_xlabel("layer")

    return draw(words, paint, height=lambda narrow: 2.1 if narrow else 2.3)


def widths(layers: Sequence[Layer]) -> Plot | None:
    """Return a plot of the kept widths of every layer, one panel per module."""
    names = sorted({name for layer in layers for name in layer.widths if _cut(layer, name)})
    names = names[:_MAX_WIDTHS]
    if not names:
        return None
    dense = any(layer.widths_before for layer in layers)
    words = Words(
        key="widths",
        title="Kept width per layer",
        description="; ".join(_width_text(layers, name) for name in names) + ".",
        caption="One panel per width that was cut; every axis starts at 0.",
        legend=(*((("before", BEFORE, "box"),) if dense else ()), ("kept", KEPT, "box")),
    )

    def columns(narrow: bool) -> int:
        return 1 if narrow else min(len(names), 4 if len(names) in _BY_FOUR else 3)

    def paint(sheet: Sheet) -> None:
        grid = sheet.figure.subplots(
            math.ceil(len(names) / columns(sheet.narrow)), columns(sheet.narrow), squeeze=False
        )
        for position, axes in enumerate(grid.flat):
            if position >= len(names):
                axes.set_axis_off()
                continue
            name = names[position]
            mine = [layer for layer in layers if name in layer.widths]
            places = [layer.index for layer in mine]
            axes.grid(axis="y")
            axes.bar(places, [x.widths_before.get(name, 0.0) for x in mine], _BAR, color=BEFORE)
            axes.bar(places, [x.widths[name] for x in mine], _inner(layers), color=KEPT)
            number_axis(axes, [layer.index for layer in layers])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.set_title(label(name), pad=4)

    def height(narrow: bool) -> float:
        return 1.5 * math.ceil(len(names) / columns(narrow)) + 0.1

    return draw(words, paint, height=height)


def errors(layers: Sequence[Layer]) -> Plot | None:
    """Return a plot of the relative error of every layer's output; None if none was measured."""
    measured = [(layer.index, layer.error) for layer in layers if layer.error is not None]
    if not measured:
        return None
    worst, largest = max(measured, key=lambda pair: pair[1])
    smallest = min(error for _, error in measured)
    words = Words(
        key="errors",
        title="Error per layer",
        description=f"Relative error of {counted(len(measured), 'layer')}: "
        f"{between(decimal(smallest), decimal(largest))}; layer {worst} has the largest.",
        caption="Relative error of each layer's output on the probe sequences, with the layer's "
        f"dense input. Layer {worst} has the largest: {percent(largest, digits=2)}.",
    )

    def paint(sheet: Sheet) -> None:
        axes = sheet.figure.subplots()
        axes.grid(axis="y")
        positions = [index for index, _ in measured]
        axes.bar(positions, [error for _, error in measured], _inner(layers), color=KEPT)
        axes.axhline(0.0, color=MUTED, linewidth=0.8)
        number_axis(axes, positions)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * 100:.3g} %"))
        axes.set_xlabel("layer")

    return draw(words, paint, height=lambda narrow: 1.9 if narrow else 2.0)


def _cut(layer: Layer, name: str) -> bool:
    return layer.widths[name] != layer.widths_before.get(name)


def _width_text(layers: Sequence[Layer], name: str) -> str:
    kept = [layer.widths[name] for layer in layers if name in layer.widths]
    span = count(kept[0]) if min(kept) == max(kept) else f"{count(min(kept))} to {count(max(kept))}"
    return f"{name}: {span}"


def _inner(layers: Sequence[Layer]) -> float:
    """Return the width of a bar drawn before another; of many layers both are alike."""
    return _BAR if len(layers) > _MANY else 0.62 * _BAR
