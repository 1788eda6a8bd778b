"""Plots of what every layer lost: parameters, widths, and error on the probe."""

import math
from collections.abc import Sequence

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
    value_axis,
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
        panel = sheet.panel()
        positions = [layer.index for layer in layers]
        panel.bars(positions, [layer.before for layer in layers], _BAR, BEFORE)
        panel.bars(positions, [layer.after for layer in layers], _inner(layers), KEPT)
        number_axis(panel, positions)
        value_axis(panel, max(max(x.before, x.after) for x in layers), short_tick)
        panel.x_label = "layer"

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
        sheet.columns = columns(sheet.narrow)
        for name in names:
            panel = sheet.panel()
            mine = [layer for layer in layers if name in layer.widths]
            places = [layer.index for layer in mine]
            before = [x.widths_before.get(name, 0.0) for x in mine]
            kept = [x.widths[name] for x in mine]
            panel.bars(places, before, _BAR, BEFORE)
            panel.bars(places, kept, _inner(layers), KEPT)
            number_axis(panel, [layer.index for layer in layers], most=8)
            value_axis(panel, max(*before, *kept), lambda y: f"{y:.0f}", whole=True)
            panel.title = label(name)

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
        panel = sheet.panel()
        positions = [index for index, _ in measured]
        number_axis(panel, positions)
        panel.bars(positions, [error for _, error in measured], _inner(layers), KEPT)
        panel.across(0.0, MUTED, width=0.8)
        value_axis(panel, largest, lambda y: f"{y * 100:.3g} %")
        panel.x_label = "layer"

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
