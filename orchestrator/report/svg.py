"""Plots as inline SVG: drawn for wide and narrow screens, in the colours of the page.

Colours are custom properties of the page's style sheet, so that one drawing works in light and dark
mode. A plotting library would take longer to import than a small run computes.
"""

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK = "var(--ink)"
MUTED = "var(--muted)"
GRID = "var(--grid)"
KEPT = "var(--kept)"
CUT = "var(--cut)"
BEFORE = "var(--before)"
SURFACE = "var(--surface)"
KIND_COLOURS = tuple(f"var(--kind-{i})" for i in range(11))

WIDE, NARROW = 648.0, 238.0  # points
MAX_LABEL = 20
TEXT, SMALL = 9.0, 8.5  # sizes of letters, in points
PER_INCH = 72.0

_LETTER = 0.56  # mean width of a letter, relative to its size
_PAD, _RIGHT = 4.0, 13.0
_TITLE_ROW, _TOP, _TICK_ROW, _LABEL_ROW = 15.0, 5.0, 15.0, 12.0
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_DASHES = "stroke-dasharray:3 2"
_FIRST_FOREIGN = 0x250
_CLOSE = 1e-9  # relative to a step: rounding of the sums of steps
_WIDE_RANGE = 3.0  # of perplexities and losses: from here on the scale is logarithmic

Point = tuple[float, float]
Tick = tuple[float, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The texts of a plot.

    Attributes:
        key: name of the plot, unique in the page.
        title: what it shows; also the short text alternative.
        description: the long text alternative: the finding, in numbers.
        caption: how to read the plot.
        legend: (label, colour, shape) with a shape of the style sheet: box, line, dot, square,
            diamond or dash.
    """

    key: str
    title: str
    description: str
    caption: str
    legend: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot with its texts and both drawings, each a complete ``<svg>`` element."""

    words: Words
    wide: str
    narrow: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where a panel lies on its sheet, in points, and the data range that it shows."""

    left: float
    right: float
    top: float
    bottom: float
    x_limits: Point
    y_limits: Point
    log: bool

    def x(self, value: float) -> float:
        """Return the place of a value on the horizontal axis."""
        low, high = self.x_limits
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Return the place of a value on the vertical axis."""
        low, high = self.y_limits
        if self.log:
            low, high = math.log10(low), math.log10(high)
            value = math.log10(value) if value > 0 else low - 1.0
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


@dataclass(slots=True, kw_only=True)
class Panel:
    """A pair of axes, and what is drawn in data coordinates between them.

    Attributes:
        x_limits: the range shown.
        y_limits: the range shown.
        x_ticks: (value, label) of each.
        y_ticks: (value, label) of each; the labels of a panel beside another may be left out.
        title: above it.
        x_label: below the labels of the ticks.
        y_label: beside the labels of the ticks.
        note: between the labels of the horizontal ticks.
        log: the vertical scale is logarithmic.
        grid: lines at the ticks of this axis: x, y, or none.
        axis: the vertical axis has a line.
        above: (x value, text) of numbers over the panel.
    """

    x_limits: Point = (0.0, 1.0)
    y_limits: Point = (0.0, 1.0)
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = ()
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    note: str = ""
    log: bool = False
    grid: str = "y"
    axis: bool = True
    above: list[Tick] = field(default_factory=list)
    _shapes: list[Callable[[Frame], str]] = field(default_factory=list)

    def bars(
        self, positions: Sequence[float], heights: Sequence[float], width: float, colour: str
    ) -> None:
        """Draw a bar from 0 up at each position."""
        for position, height in zip(positions, heights, strict=True):
            x = (position - width / 2, position + width / 2)
            self.box(x, (0.0, height), colour)

    def box(self, x: Point, y: Point, colour: str, *, opacity: float = 1.0) -> None:
        """Fill a rectangle."""
        style = f"fill:{colour}" + ("" if opacity == 1.0 else f";opacity:{opacity:g}")

        def shape(at: Frame) -> str:
            left, right, low, high = at.x(x[0]), at.x(x[1]), at.y(y[0]), at.y(y[1])
            return _path(f"M{_n(left)} {_n(low)}H{_n(right)}V{_n(high)}H{_n(left)}z", style)

        self._shapes.append(shape)

    def line(
        self, points: Sequence[Point], colour: str, *, width: float = 1.6, dashed: bool = False
    ) -> None:
        """Draw a line through points."""
        style = f"fill:none;stroke:{colour};stroke-width:{width:g};stroke-linecap:round"
        style = f"{style};{_DASHES}" if dashed else style

        def shape(at: Frame) -> str:
            return _path("M" + "L".join(f"{_n(at.x(x))} {_n(at.y(y))}" for x, y in points), style)

        if points:
            self._shapes.append(shape)

    def across(self, y: float, colour: str, *, width: float) -> None:
        """Draw a horizontal line from side to side."""
        self.line([(self.x_limits[0], y), (self.x_limits[1], y)], colour, width=width)

    def upright(self, x: float) -> None:
        """Draw a dashed vertical line from bottom to top."""
        style = f"fill:none;stroke:{INK};stroke-width:0.9;{_DASHES}"
        self._shapes.append(lambda at: _path(f"M{_n(at.x(x))} {_n(at.bottom)}V{_n(at.top)}", style))

    def markers(
        self, points: Sequence[Point], shape: str, size: float, colour: str, *, ring: bool = False
    ) -> None:
        """Draw a dot, square or diamond at each point; a ring is a dot with an outline."""
        style = f"fill:{SURFACE};stroke:{colour};stroke-width:1.1" if ring else f"fill:{colour}"

        def drawn(at: Frame) -> str:
            return _path("".join(_marker(shape, at.x(x), at.y(y), size) for x, y in points), style)

        if points:
            self._shapes.append(drawn)

    def text(self, x: float, y: float, text: str) -> None:
        """Write a short text around a point."""
        style = f"font-size:{SMALL:g}px;text-anchor:middle;fill:{INK}"

        def shape(at: Frame) -> str:
            line = at.y(y) + SMALL / 3  # below the middle of its letters
            return f'<text x="{_n(at.x(x))}" y="{_n(line)}" style="{style}">{escape(text)}</text>'

        self._shapes.append(shape)

    def picture(self, values: NDArray[Any], x: Point, y: Point, colour: str) -> None:
        """Draw a heat map; ``values`` are opacities from 0 to 1, (rows, columns), lowest first."""
        data = base64.b64encode(_png(values[::-1], colour)).decode()

        def shape(at: Frame) -> str:
            left, top = at.x(x[0]), at.y(y[1])
            return (
                f'<image x="{_n(left)}" y="{_n(top)}" width="{_n(at.x(x[1]) - left)}" '
                f'height="{_n(at.y(y[0]) - top)}" preserveAspectRatio="none" '
                f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
            )

        self._shapes.append(shape)

    @property
    def margins(self) -> tuple[float, float, float]:
        """What its labels need at the left, above and below, in points."""
        labels = max((text_width(text, SMALL) for _, text in self.y_ticks), default=0.0)
        left = _PAD + labels + (_LABEL_ROW if self.y_label else 0.0) + (_PAD if labels else 0.0)
        above = _TITLE_ROW if self.title or self.above else _TOP
        return left, above, _TICK_ROW + (_LABEL_ROW if self.x_label else 0.0)

    def drawn(self, at: Frame, clip: str) -> Iterator[str]:
        """Yield its elements; ``clip`` is a name for the area inside the axes."""
        if self.grid:
            yield from self._grid(at)
        yield f'<clipPath id="{clip}"><path d="{_area(at)}"/></clipPath>'
        yield f'<g clip-path="url(#{clip})">'
        yield from (shape(at) for shape in self._shapes)
        yield "</g>"
        edge = f"fill:none;stroke:{GRID};stroke-width:0.8"
        up = f"M{_n(at.left)} {_n(at.top)}V{_n(at.bottom)}" if self.axis else ""
        yield _path(f"{up}M{_n(at.left)} {_n(at.bottom)}H{_n(at.right)}", edge)
        yield from self._labels(at)

    def _grid(self, at: Frame) -> Iterator[str]:
        across = self.grid == "y"
        lines = [
            f"M{_n(at.left)} {_n(at.y(value))}H{_n(at.right)}"
            if across
            else f"M{_n(at.x(value))} {_n(at.bottom)}V{_n(at.top)}"
            for value, _ in (self.y_ticks if across else self.x_ticks)
        ]
        yield _path("".join(lines), f"fill:none;stroke:{GRID};stroke-width:0.7")

    def _labels(self, at: Frame) -> Iterator[str]:
        row, middle = at.bottom + 11.0, (at.left + at.right) / 2
        ticks = "".join(f"M{_n(at.x(value))} {_n(at.bottom)}v3" for value, _ in self.x_ticks)
        yield _path(ticks, f"fill:none;stroke:{GRID};stroke-width:0.8")
        for value, text in self.x_ticks:
            yield _text(text, at.x(value), row, size=SMALL)
        for value, text in self.y_ticks:
            yield _text(text, at.left - _PAD, at.y(value) + 3.0, size=SMALL, anchor="end")
        for value, text in self.above:
            yield _text(text, at.x(value), at.top - 2.0, size=SMALL)
        if self.note:
            yield _text(self.note, middle, row, size=SMALL)
        if self.title:
            style = f"font-weight:bold;fill:{INK};font-size:{TEXT:g}px"
            where = f'x="{_n(at.left)}" y="{_n(at.top - 4.0)}"'
            yield f'<text {where} style="{style}">{escape(self.title)}</text>'
        if self.x_label:
            yield _text(self.x_label, middle, row + _LABEL_ROW, size=TEXT)
        if self.y_label:
            x, y = at.left - self.margins[0] + _PAD + 6.0, (at.top + at.bottom) / 2
            turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"'
            yield _text(self.y_label, x, y, size=TEXT, more=turn)


@dataclass(slots=True, kw_only=True)
class Sheet:
    """What is painted on.

    Attributes:
        narrow: it is for a narrow screen.
        columns: of panels.
        panels: row by row.
    """

    narrow: bool
    columns: int = 1
    panels: list[Panel] = field(default_factory=list)

    def panel(self) -> Panel:
        """Return the next panel."""
        self.panels.append(Panel())
        return self.panels[-1]

    def frames(self, height: float) -> Iterator[Frame]:
        """Yield where each panel lies: all are of one size, with room for their labels."""
        width, columns = NARROW if self.narrow else WIDE, self.columns
        margins = [panel.margins for panel in self.panels]
        rows = math.ceil(len(margins) / columns)
        lefts = [max(m[0] for m in margins[column::columns]) for column in range(columns)]
        of_row = [margins[row * columns : (row + 1) * columns] for row in range(rows)]
        tops = [max(m[1] for m in row) for row in of_row]
        bottoms = [max(m[2] for m in row) for row in of_row]
        inner = (width - sum(lefts) - columns * _RIGHT) / columns
        tall = (height - sum(tops) - sum(bottoms)) / rows
        for number, panel in enumerate(self.panels):
            row, column = divmod(number, columns)
            left = sum(lefts[: column + 1]) + column * (inner + _RIGHT)
            top = sum(tops[: row + 1]) + sum(bottoms[:row]) + row * tall
            yield Frame(
                left=left,
                right=left + inner,
                top=top,
                bottom=top + tall,
                x_limits=panel.x_limits,
                y_limits=panel.y_limits,
                log=panel.log,
            )


def draw(words: Words, paint: Callable[[Sheet], None], *, height: Callable[[bool], float]) -> Plot:
    """Return the plot, drawn wide and narrow; ``height`` returns inches, given ``narrow``."""
    wide, narrow = (
        _drawing(words, paint, narrow=narrow, height=height(narrow) * PER_INCH)
        for narrow in (False, True)
    )
    return Plot(words=words, wide=wide, narrow=narrow)


def label(text: str) -> str:
    """Return a name as an axis label: short, and in characters whose width is about known."""
    plain = "".join(c if c.isprintable() and ord(c) < _FIRST_FOREIGN else "?" for c in text)
    return plain if len(plain) <= MAX_LABEL else f"{plain[: MAX_LABEL - 1]}\u2026"


def ticks(limits: Point, *, most: int, whole: bool = False) -> list[float]:
    """Return round numbers in a range, evenly spaced.

    Args:
        limits: the range.
        most: intervals between them.
        whole: whole numbers only.
    """
    low, high = limits
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    found = (power * size * step for size in (1.0, 10.0, 100.0) for step in _STEPS)
    step = next(
        each
        for each in found
        if (high - low) / each <= most * (1 + _CLOSE)
        and (not whole or (each >= 1 and each == round(each)))
    )
    first, last = math.ceil(low / step - _CLOSE), math.floor(high / step + _CLOSE)
    return [number * step for number in range(first, last + 1)]


def number_axis(panel: Panel, positions: Sequence[int], *, most: int = 12) -> None:
    """Set up the x axis for layers or sites: whole numbers only, with a narrow margin."""
    panel.x_limits = (min(positions) - 0.6, max(positions) + 0.6)
    panel.x_ticks = [(x, f"{x:.0f}") for x in ticks(panel.x_limits, most=most, whole=True)]


def value_axis(
    panel: Panel, largest: float, text: Callable[[float], str], *, whole: bool = False
) -> None:
    """Set up the y axis for bars: from 0 to a little over the largest."""
    panel.y_limits = (0.0, 1.05 * largest if largest > 0 else 1.0)
    panel.y_ticks = [(y, text(y)) for y in ticks(panel.y_limits, most=4, whole=whole)]


def span_axis(panel: Panel, values: Sequence[float]) -> None:
    """Set up the y axis for a curve: around its values, logarithmic where their range is wide."""
    low, high = min(values), max(values)
    panel.log = is_wide(values)
    if panel.log:
        margin = (high / low) ** 0.08
        panel.y_limits = (low / margin, high * margin)
        steps = (1, 2, 3, 5) if high / low < 100 else (1,)  # noqa: PLR2004 two decades
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**power for power in powers for step in steps]
        found = [y for y in found if panel.y_limits[0] <= y <= panel.y_limits[1]]
    else:
        panel.y_limits = widened(low, high, 0.08)
        found = ticks(panel.y_limits, most=6)
    panel.y_ticks = [(y, f"{y:,.4g}") for y in found]


def is_wide(values: Sequence[float]) -> bool:
    """Return whether a curve of these values is drawn on a logarithmic scale."""
    return min(values) > 0 and max(values) / min(values) > _WIDE_RANGE


def widened(low: float, high: float, share: float) -> Point:
    """Return a range with a margin on both sides, also where it is a single value."""
    margin = (high - low) * share or max(abs(high) * share, share)
    return low - margin, high + margin


def _drawing(words: Words, paint: Callable[[Sheet], None], *, narrow: bool, height: float) -> str:
    sheet = Sheet(narrow=narrow)
    paint(sheet)
    name = f"{words.key}-{'narrow' if narrow else 'wide'}"
    pairs = enumerate(zip(sheet.panels, sheet.frames(height), strict=True))
    inside = "".join(
        "".join(panel.drawn(frame, f"{name}-clip-{number}")) for number, (panel, frame) in pairs
    )
    return (
        f'<svg viewBox="0 0 {_n(NARROW if narrow else WIDE)} {_n(height)}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(words.title)}</title>'
        f'<desc id="{name}-desc">{escape(words.description)}</desc>{inside}</svg>'
    )


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _path(d: str, style: str) -> str:
    return f'<path d="{d}" style="{style}"/>' if d else ""


def _area(at: Frame) -> str:
    return f"M{_n(at.left)} {_n(at.bottom)}H{_n(at.right)}V{_n(at.top)}H{_n(at.left)}z"


def _text(
    text: str, x: float, y: float, *, size: float, anchor: str = "middle", more: str = ""
) -> str:
    style = f"font-size:{size:g}px;text-anchor:{anchor};fill:{MUTED}"
    return f'<text x="{_n(x)}" y="{_n(y)}" style="{style}"{more}>{escape(text)}</text>'


def text_width(text: str, size: float) -> float:
    """Return about how wide a text is, in points."""
    return _LETTER * size * len(text)


def _marker(shape: str, x: float, y: float, size: float) -> str:
    half = size / 2
    if shape == "square":
        return f"M{_n(x - half)} {_n(y - half)}h{_n(size)}v{_n(size)}h{_n(-size)}z"
    if shape == "diamond":
        half *= math.sqrt(2)  # as large as a square
        move = f"l{_n(half)} {_n(half)}l{_n(-half)} {_n(half)}l{_n(-half)} {_n(-half)}z"
        return f"M{_n(x)} {_n(y - half)}{move}"
    arc = f"a{_n(half)} {_n(half)} 0 1 0"
    return f"M{_n(x - half)} {_n(y)}{arc} {_n(size)} 0{arc} {_n(-size)} 0z"


def _png(opacities: NDArray[Any], colour: str) -> bytes:
    """Return a PNG of one colour, ``#rrggbb``, with an opacity for each pixel."""
    rows, columns = opacities.shape
    pixels = np.empty((rows, columns, 4), dtype=np.uint8)
    pixels[..., :3] = list(bytes.fromhex(colour.removeprefix("#")))
    pixels[..., 3] = (opacities * 255).round()
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # each with no filter
    head = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)  # 8 bits, RGBA
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
