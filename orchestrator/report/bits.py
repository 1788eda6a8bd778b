"""What a quantised result stores: plots and notes of bits, bytes by kind, and rounding errors."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from orchestrator.report.document import Document, Layer, Matrix, layers, rows, section
from orchestrator.report.numbers import (
    TIMES,
    bytes_text,
    change,
    decimal,
    number,
    percent,
    quotient,
)
from orchestrator.report.svg import (
    BEFORE,
    KEPT,
    NARROW,
    PER_INCH,
    SMALL,
    WIDE,
    Panel,
    Plot,
    Sheet,
    Words,
    draw,
    number_axis,
    text_width,
    ticks,
    value_axis,
)

_SHADE_OF = {2: 8, 3: 18, 4: 32, 5: 42, 6: 50, 7: 57, 8: 64}  # bits -> per cent of the colour
_WHOLE = f"color-mix(in srgb, {BEFORE} 30%, transparent)"
_ROW, _GAP = 17.0, 1.0  # of a heat map, in points
_WIDTHS = (("qk head", "q/k"), ("vo head", "v/o"), ("intermediate", "FFN"))
_BAR = 0.72
_GOOD = ("", "cholesky", "nearest")  # factors that needed no more damping than usual
_SHORT = "_proj"


def is_quantised(report: Document) -> bool:
    """Return whether matrices of the result are quantised."""
    return section(report, "storage").get("quantised") is True


def by_kind(report: Document) -> list[tuple[str, str, str, str]]:
    """Return kind, bytes before, bytes after, change; the last row is the sum."""
    found = section(report, "storage")
    kinds = [*rows(found, "kinds"), {"kind": "all tensors", **found}]
    return [
        (
            str(row["kind"]),
            bytes_text(row.get("before")),
            bytes_text(row.get("after")),
            change(quotient(row.get("after"), row.get("before"))),
        )
        for row in kinds
        if row.get("before") or row.get("after")
    ]


def bits_note(report: Document) -> str:
    """Return the mean bits of a weight, and what is not quantised; empty if nothing is."""
    found = section(report, "storage")
    if not is_quantised(report):
        return ""
    bits, dtype = section(found, "bits"), section(found, "dtype")
    text = f"A weight of the linears takes {decimal(bits.get('after'))} bits on average, scales "
    text += "included"
    if _differ(bits.get("after"), bits.get("of_input")):
        text += f", which is {decimal(bits.get('of_input'))} for each weight of the input"
    tables = section(found, "tables")
    text += "".join(f"; the {name} has {table['scheme']}" for name, table in tables.items())
    kinds = [str(kind) for kind in found.get("unquantised") or ()]
    text += f". Not quantised, in {dtype.get('after')}: {', '.join(kinds)}."
    if dtype.get("after") == "float32":
        text += " --dtype bfloat16 stores these in half."
    return text


def damped_note(report: Document) -> str:
    """Return which matrices' Gram matrices needed extra damping; empty if none did."""
    found: dict[str, list[str]] = {}
    for where, factor in (*_factors(report), *_corrected_factors(report)):
        if factor not in _GOOD:
            found.setdefault(factor, []).append(where)
    if not found:
        return ""
    said = "; ".join(f"{factor}: {', '.join(names)}" for factor, names in found.items())
    return f"Gram matrices that needed more damping than usual: {said}."


def _factors(report: Document) -> Iterator[tuple[str, str]]:
    """Yield (matrix, how the Gram matrix of its inputs was factored)."""
    for layer in layers(report):
        yield from ((f"layer {layer.index} {each.name}", each.factor) for each in layer.matrices)


def _corrected_factors(report: Document) -> Iterator[tuple[str, str]]:
    """Yield the same of the corrected pass, for each half of a layer."""
    for row in rows(report, "layers") if is_quantised(report) else ():
        for half, linear in section(row, "refit", "linears").items():
            where = f"layer {row.get('layer')} up to {half} in the corrected pass"
            rungs = linear.get("rungs")  # a list, where it was rounded
            yield from ((where, rung) for rung in (rungs if isinstance(rungs, list) else ()))


def heat_map(report: Document, blocks: Sequence[Layer]) -> Plot | None:
    """Return a table of layers by matrices, coloured by bits; equal neighbours share a row."""
    names = list(dict.fromkeys(each.name for layer in blocks for each in layer.matrices))
    if not names:
        return None
    tables = {
        str(name): (int(table["bits"]), str(table["scheme"]))
        for name, table in section(report, "storage", "tables").items()
    }
    runs = [list(run) for _, run in groupby(blocks, key=_look)]
    used = {each.bits for layer in blocks for each in layer.matrices}
    used |= {bits for bits, _ in tables.values()}
    legend = [(f"{bits} bits", shade(bits), "box") for bits in sorted(used) if bits]
    legend += [("not quantised", shade(0), "box")] if 0 in used else []
    words = Words(
        key="bits",
        title="Bits and widths by layer",
        description="; ".join(_run_text(run) for run in runs) + ".",
        caption="Each cell has bits and group, the weights that share a scale: 4/32. Layers that "
        "are alike share a row. At the right: widths of heads and of the FFN.",
        legend=tuple(legend),
    )
    cells = [_cells(run[0], names) for run in runs]
    labels = [_span(run) for run in runs]
    before = [("embed", tables["embedding"])] if "embedding" in tables else []
    after = [("head", tables["head"])] if "head" in tables else []
    count = len(runs) + len(before) + len(after)

    def paint(sheet: Sheet) -> None:
        panel = sheet.panel()
        kept = [] if sheet.narrow else [pair for pair in _WIDTHS if _has(blocks, pair[0])]
        columns = len(names) + len(kept)
        panel.x_limits, panel.y_limits = (0.0, float(columns)), (0.0, float(count))
        panel.grid, panel.axis = "", False
        left = 8 + max(text_width(text, SMALL) for text in ("embed", *labels))
        room = ((NARROW if sheet.narrow else WIDE) - left - 13) / columns
        top = float(count)
        panel.above = [(x + 0.5, _column(name, room)) for x, name in enumerate(names)]
        panel.above += [(len(names) + x + 0.5, name) for x, (_, name) in enumerate(kept)]
        rows_: list[tuple[str, list[tuple[float, float, int, str]], Layer | None]] = [
            (name, [(0.0, float(len(names)), *table)], None) for name, table in before
        ]
        rows_ += [(text, own, run[0]) for text, own, run in zip(labels, cells, runs, strict=True)]
        rows_ += [(name, [(0.0, float(len(names)), *table)], None) for name, table in after]
        ticks_ = []
        for label, own, layer in rows_:
            top -= 1
            ticks_.append((top + 0.5, label))
            for x, wide, bits, text in own:
                _cell(panel, (x, top), wide, bits, text, room)
            for place, (key, _) in enumerate(kept if layer else ()):
                width = f"{layer.widths.get(key, 0):.0f}" if layer else ""
                panel.text(len(names) + place + 0.5, top + 0.5, width)
        panel.y_ticks = ticks_

    return draw(words, paint, height=lambda _: (count * _ROW + 32) / PER_INCH)


def errors(blocks: Sequence[Layer]) -> Plot | None:
    """Return a plot of the relative error of each matrix, beside that of the nearest values."""
    names = list(dict.fromkeys(
        each.name for layer in blocks for each in layer.matrices if each.error is not None
    ))  # fmt: skip
    if not names:
        return None
    found = {
        name: [
            (layer.index, each.error or 0.0, each.nearest or 0.0)
            for layer in blocks
            for each in layer.matrices
            if each.name == name and each.error is not None
        ]
        for name in names
    }
    largest = {name: max(points, key=lambda point: point[1]) for name, points in found.items()}
    words = Words(
        key="rounding",
        title="Error of rounding",
        description="; ".join(
            f"{name}: at most {percent(error, digits=2)}, in layer {layer}"
            for name, (layer, error, _) in largest.items()
        )
        + ".",
        caption="Squared error of the outputs of each matrix on the calibration data, relative to "
        "their square, before any corrected pass. Behind it: if each weight is rounded to the "
        "nearest value.",
        legend=(("rounded", KEPT, "box"), ("to the nearest value", BEFORE, "box")),
    )

    def columns(narrow: bool) -> int:
        return 1 if narrow else min(len(names), 4)

    def paint(sheet: Sheet) -> None:
        sheet.columns = columns(sheet.narrow)
        for name, points in found.items():
            panel = sheet.panel()
            places = [layer for layer, *_ in points]
            panel.bars(places, [nearest for *_, nearest in points], _BAR, BEFORE)
            panel.bars(places, [error for _, error, _ in points], 0.62 * _BAR, KEPT)
            number_axis(panel, [layer.index for layer in blocks], most=8)
            top = max(max(error, nearest) for _, error, nearest in points)
            value_axis(panel, top, lambda y: f"{y * 100:.3g} %")
            panel.y_ticks = [(y, f"{y * 100:.3g} %") for y in ticks(panel.y_limits, most=3)]
            panel.title = name.removesuffix(_SHORT).replace(f"{_SHORT}.", " ")

    def height(narrow: bool) -> float:
        return 1.4 * math.ceil(len(names) / columns(narrow)) + 0.1

    return draw(words, paint, height=height)


def table(blocks: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return a row for each matrix: layer, name, size, scheme, errors and factor, as texts."""
    return [
        {
            "layer": layer.index,
            "name": each.name,
            "size": f"{each.rows:,} {TIMES} {each.width:,}",
            "scheme": each.scheme or "not quantised",
            "error": percent(each.error, digits=3),
            "nearest": percent(each.nearest, digits=3),
            "factor": each.factor,
        }
        for layer in blocks
        for each in layer.matrices
    ]


def shade(bits: int) -> str:
    """Return the colour of a number of bits; that of what is not quantised for 0."""
    if not bits:
        return _WHOLE
    return f"color-mix(in srgb, {KEPT} {_SHADE_OF.get(bits, 59)}%, transparent)"


def _cell(
    panel: Panel, corner: tuple[float, float], wide: float, bits: int, text: str, room: float
) -> None:
    x, y = corner
    gap = _GAP / room, _GAP / _ROW
    panel.box((x + gap[0], x + wide - gap[0]), (y + gap[1], y + 1 - gap[1]), shade(bits))
    fits = [each for each in (text, str(bits) if bits else "") if _fits(each, wide * room)]
    if fits and fits[0]:
        panel.text(x + wide / 2, y + 0.5, fits[0])


def _fits(text: str, room: float) -> bool:
    return text_width(text, SMALL) + 3 * _GAP <= room


def _cells(layer: Layer, names: Sequence[str]) -> list[tuple[float, float, int, str]]:
    """Return (left, width, bits, text) of the cells of a row."""
    own = {each.name: each for each in layer.matrices}
    return [
        (float(x), 1.0, own[name].bits, own[name].scheme)
        for x, name in enumerate(names)
        if name in own
    ]


def _look(layer: Layer) -> tuple[Any, ...]:
    """Return all that the row of a layer shows."""
    widths = tuple(layer.widths.get(key) for key, _ in _WIDTHS)
    return widths, tuple((each.name, each.scheme) for each in layer.matrices)


def _span(run: Sequence[Layer]) -> str:
    first, last = run[0].index, run[-1].index
    return f"{first}" if first == last else f"{first}\u2013{last}"


def _run_text(run: Sequence[Layer]) -> str:
    schemes: dict[str, list[str]] = {}
    for each in run[0].matrices:
        schemes.setdefault(each.scheme or "not quantised", []).append(_plain(each))
    said = ", ".join(f"{scheme} in {' '.join(names)}" for scheme, names in schemes.items())
    return f"layer {_span(run)}: {said}"


def _plain(matrix: Matrix) -> str:
    return matrix.name.replace(_SHORT, "")


def _column(name: str, room: float) -> str:
    short = name.replace(_SHORT, "")
    linear, _, part = short.partition(".")
    part = {"first": "1", "second": "2"}.get(part, part)
    short = f"{linear}{part}" if part else linear
    return short if _fits(short, room) else short[: max(1, int(room / (SMALL * 0.56)))]


def _has(blocks: Sequence[Layer], key: str) -> bool:
    return any(key in layer.widths for layer in blocks)


def _differ(a: object, b: object) -> bool:
    first, second = number(a), number(b)
    return first is not None and second is not None and abs(first - second) > 0.005 * second
