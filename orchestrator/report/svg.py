"""Plots as inline SVG: drawn for wide and narrow screens, in the colours of the page.

Plots are painted in the placeholder colours defined here. In the SVG each becomes a custom property
of the page's style sheet, so that one drawing works in light and dark mode.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010101"
MUTED = "#010102"
GRID = "#010103"
KEPT = "#010104"
CUT = "#010105"
BEFORE = "#010106"
SURFACE = "#010107"
KIND_COLOURS = tuple(f"#0102{i:02x}" for i in range(11))

WIDE_INCHES = 9.0
NARROW_INCHES = 3.3
MAX_LABEL = 20

_PROPERTIES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    KEPT: "var(--kept)",
    CUT: "var(--cut)",
    BEFORE: "var(--before)",
    SURFACE: "var(--surface)",
    **{colour: f"var(--kind-{i})" for i, colour in enumerate(KIND_COLOURS)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_DROPPED = {f"{_SVG}metadata", f"{_SVG}style"}
_COLOUR = re.compile("|".join(_PROPERTIES))
_FONT = re.compile(r"\s*font-family:[^;]*;?")
_DECIMALS = re.compile(r"-?\d+\.\d{2,}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMERIC = ("d", "x", "y", "width", "height", "transform", "points", "style")
_FIRST_FOREIGN = 0x250


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

    @property
    def keys(self) -> tuple[tuple[str, str, str], ...]:
        """The legend with the style sheet's colours."""
        return tuple((label, _PROPERTIES[colour], shape) for label, colour, shape in self.legend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot with its texts and both drawings, each a complete ``<svg>`` element."""

    words: Words
    wide: str
    narrow: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The figure to paint on, and whether it is for a narrow screen."""

    figure: Figure
    narrow: bool


def draw(words: Words, paint: Callable[[Sheet], None], *, height: Callable[[bool], float]) -> Plot:
    """Return the plot, drawn wide and narrow; ``height`` returns inches, given ``narrow``."""
    drawings = []
    for narrow in (False, True):
        size = (NARROW_INCHES if narrow else WIDE_INCHES, height(narrow))
        with mpl.rc_context():
            mpl.rcdefaults()  # independent of the user's matplotlib settings
            mpl.rcParams.update(_STYLE)
            figure = Figure(figsize=size, layout="constrained")
            paint(Sheet(figure=figure, narrow=narrow))
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        drawings.append(_inline(stream.getvalue(), words, "narrow" if narrow else "wide"))
    return Plot(words=words, wide=drawings[0], narrow=drawings[1])


def label(text: str) -> str:
    """Return a name as an axis label: short, and in characters that the layout can measure."""
    plain = "".join(c if c.isprintable() and ord(c) < _FIRST_FOREIGN else "?" for c in text)
    return plain if len(plain) <= MAX_LABEL else f"{plain[: MAX_LABEL - 1]}\u2026"


def number_axis(axes: Axes, positions: Sequence[int]) -> None:
    """Set up the x axis for layers or sites: whole numbers only, with a narrow margin."""
    axes.set_xlim(min(positions) - 0.6, max(positions) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))


def _inline(document: str, words: Words, variant: str) -> str:
    """Return the SVG as an element of the page: with unique ids, without fonts and metadata."""
    root = ElementTree.fromstring(document)
    prefix = f"{words.key}-{variant}"
    referenced = _references(root)
    for element in root.iter():
        for child in [child for child in element if child.tag in _DROPPED]:
            element.remove(child)
        _rewrite(element, prefix, referenced)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-desc")
    for position, (tag, text) in enumerate((("title", words.title), ("desc", words.description))):
        spoken = ElementTree.Element(tag, {"id": f"{prefix}-{tag}"})
        spoken.text = text
        root.insert(position, spoken)
    return _compact(ElementTree.tostring(root, encoding="unicode"))


def _references(root: ElementTree.Element) -> set[str]:
    found = set()
    for element in root.iter():
        for value in element.attrib.values():
            found.update(_REFERENCE.findall(value))
        href = element.get(_HREF, "")
        if href.startswith("#"):
            found.add(href[1:])
    return found


def _rewrite(element: ElementTree.Element, prefix: str, referenced: set[str]) -> None:
    element.tag = element.tag.removeprefix(_SVG)
    href = element.attrib.pop(_HREF, "")
    if href:
        inline = "".join(href.split())  # the base64 of an image comes in lines
        element.set("href", f"#{prefix}-{href[1:]}" if href.startswith("#") else inline)
    if element.get("id") in referenced:
        element.set("id", f"{prefix}-{element.get('id')}")
    else:
        element.attrib.pop("id", None)
    for name in _NUMERIC:
        if name in element.attrib:
            element.set(name, _DECIMALS.sub(_rounded, element.attrib[name]))
    for name, value in element.attrib.items():
        element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))
    if "style" in element.attrib:
        style = _COLOUR.sub(lambda hit: _PROPERTIES[hit.group()], element.attrib["style"])
        element.set("style", _FONT.sub("", style).replace("; ", ";").replace(": ", ":"))
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))


def _rounded(hit: re.Match[str]) -> str:
    return f"{float(hit.group()):.2f}".rstrip("0").rstrip(".")


def _compact(text: str) -> str:
    return re.sub(r">\s+<", "><", text.strip())
