"""The PCA spectrum of every site, where it was cut, and how much energy that kept."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.report.document import Site
from orchestrator.report.numbers import between, counted, kept_percent, percent
from orchestrator.report.svg import (
    CUT,
    INK,
    KEPT,
    MUTED,
    Panel,
    Plot,
    Sheet,
    Words,
    draw,
    label,
    number_axis,
    ticks,
)

MAX_PANELS = 12
CHOSEN_PANELS = 8

_WHERE = {
    "attention": ("dot", KEPT),
    "mlp": ("square", CUT),
    "head": ("diamond", INK),
    "site": ("dot", MUTED),
}
_BINS = 64
_FLOOR = -9.0
_TAIL = 0.03
_SHADE = "#4f86e8"  # with rising opacity, for light and dark pages
_FAINTEST = 0.04
_SUPERSCRIPTS = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)


def panels(sites: Sequence[Site]) -> Plot | None:
    """Return a plot with one panel per site; of many sites, some spread over the depth."""
    drawn = [site for site in sites if site.points]
    if not drawn:
        return None
    shown = chosen(drawn)
    words = Words(
        key="spectra",
        title="PCA spectrum and cut",
        description=f"{_counted(shown, drawn)}. " + "; ".join(map(_text, shown)) + ".",
        caption=f"{_counted(shown, drawn)}. Eigenvalues of the covariance, relative to the "
        "largest of the site, on a logarithmic scale; the dashed line is the cut.",
        legend=(("kept", KEPT, "line"), ("cut away", CUT, "line")),
    )
    low = _floor(shown)

    def paint(sheet: Sheet) -> None:
        sheet.columns = _columns(len(shown), narrow=sheet.narrow)
        for number, site in enumerate(shown):
            panel = sheet.panel()
            _spectrum(panel, site, low)
            panel.title = _titled(site, narrow=sheet.narrow)
            if number % sheet.columns:  # the scale is that of the first in its row
                panel.y_ticks = [(y, "") for y, _ in panel.y_ticks]

    def height(narrow: bool) -> float:
        return 1.35 * math.ceil(len(shown) / _columns(len(shown), narrow=narrow)) + 0.1

    return draw(words, paint, height=height)


def depth_map(sites: Sequence[Site]) -> Plot | None:
    """Return a heat map of all spectra by site; None if the panels show all sites."""
    drawn = [site for site in sites if site.points and site.dim]
    if len(drawn) <= MAX_PANELS:
        return None
    low = _floor(drawn)
    heights = np.array([_binned(site, low) for site in drawn]).T
    picture = _FAINTEST + (1 - _FAINTEST) * (1 - heights / low)
    cuts = [site.keep_dim / site.dim for site in drawn]
    words = Words(
        key="depth",
        title="All spectra through the depth of the model",
        description=f"{counted(len(drawn), 'site')} through the depth of the model; the cut "
        f"keeps {between(percent(min(cuts)), percent(max(cuts)))} of the components.",
        caption="One column per site, with the largest component at the bottom. A stronger colour "
        "is a larger eigenvalue relative to the largest of its site (faintest: "
        f"{_power(low)}). Components above the line were cut.",
        legend=(("cut", CUT, "line"),),
    )

    def paint(sheet: Sheet) -> None:
        panel = sheet.panel()
        first, last = drawn[0].index - 0.5, drawn[-1].index + 0.5
        panel.x_limits, panel.grid = (first, last), ""
        panel.picture(picture, (first, last), (0.0, 1.0), _SHADE)
        edges = np.linspace(first, last, len(drawn) + 1).tolist()
        steps = [(x, cut) for number, cut in enumerate(cuts) for x in edges[number : number + 2]]
        panel.line(steps, CUT)
        panel.x_ticks = [
            (x, f"{x:.0f}")
            for x in ticks(panel.x_limits, most=6 if sheet.narrow else 12, whole=True)
        ]
        panel.y_ticks = [(y, f"{y * 100:.0f} %") for y in ticks(panel.y_limits, most=5)]
        panel.x_label, panel.y_label = "site", "components"

    return draw(words, paint, height=lambda narrow: 2.2 if narrow else 2.8)


def energy(sites: Sequence[Site]) -> Plot | None:
    """Return a plot of the energy kept at every site."""
    drawn = [(site, site.energy_kept) for site in sites if site.energy_kept is not None]
    if not drawn:
        return None
    worst, least = min(drawn, key=lambda pair: pair[1])
    most = max(kept for _, kept in drawn)
    kinds = [where for where in _WHERE if any(site.where == where for site, _ in drawn)]
    words = Words(
        key="energy",
        title="Energy kept at every site",
        description=f"{counted(len(drawn), 'site')}: "
        f"{between(kept_percent(least), kept_percent(most))} of the energy is kept; {worst.name} "
        f"(site {worst.index}) keeps least.",
        caption="Share of the covariance's trace that the kept components carry. "
        f"{worst.name.capitalize()} keeps least: {kept_percent(least)}. The axis does not start "
        "at 0.",
        legend=tuple((where, _WHERE[where][1], _WHERE[where][0]) for where in kinds),
    )

    def paint(sheet: Sheet) -> None:
        panel = sheet.panel()
        size = min(5.0, max(1.6, (200.0 if sheet.narrow else 600.0) / len(drawn)))
        for where in kinds:
            mine = [(float(site.index), kept) for site, kept in drawn if site.where == where]
            panel.markers(mine, _WHERE[where][0], size, _WHERE[where][1])
        number_axis(panel, [site.index for site, _ in drawn], most=6 if sheet.narrow else 12)
        bottom = max(0.0, least - 0.15 * (1.0 - least) - 1e-6)
        panel.y_limits = (bottom, 1.0 + 0.05 * (1.0 - bottom))
        panel.y_ticks = [(y, f"{y * 100:.6g} %") for y in ticks(panel.y_limits, most=5)]
        panel.x_label = "site"

    return draw(words, paint, height=lambda narrow: 2.2 if narrow else 2.4)


def chosen(sites: Sequence[Site]) -> list[Site]:
    """Return at most ``MAX_PANELS`` sites: all, or an even selection that includes the worst."""
    if len(sites) <= MAX_PANELS:
        return list(sites)
    worst = min(range(len(sites)), key=lambda i: _kept(sites[i]))
    spread = np.linspace(0, len(sites) - 1, CHOSEN_PANELS).round().astype(int).tolist()
    inner = range(1, CHOSEN_PANELS - 1)
    if worst not in spread:
        spread[min(inner, key=lambda i: abs(spread[i] - worst))] = worst
    return [sites[i] for i in sorted(spread)]


def _spectrum(panel: Panel, site: Site, low: float) -> None:
    kept = [point for point in site.points if point[0] <= site.keep_dim]
    cut = [point for point in site.points if point[0] > site.keep_dim]
    panel.x_limits, panel.y_limits, panel.log = (1.0, max(site.dim, 2)), (10.0**low, 3.0), True
    panel.x_ticks = [(1.0, "1"), (float(site.dim), str(site.dim))] if site.dim > 1 else [(1.0, "1")]
    panel.y_ticks = [(10.0**power, _power(power)) for power in _powers(low)]
    if site.keep_dim < site.dim:
        panel.box((site.keep_dim, site.dim), panel.y_limits, CUT, opacity=0.1)
    panel.line([*kept, *cut[:1]], KEPT)  # shared, so that the curve has no gap at the cut
    panel.line(cut, CUT)
    if site.keep_dim < site.dim:
        panel.upright(site.keep_dim)
    if site.energy_kept is not None:
        # Between the two tick labels, where no curve can cross it.
        panel.note = f"{kept_percent(site.energy_kept)} kept"


def _titled(site: Site, *, narrow: bool) -> str:
    name = label(site.name)
    return name if narrow else f"{site.index} \u00b7 {name}"


def _kept(site: Site) -> float:
    return 1.0 if site.energy_kept is None else site.energy_kept


def _columns(num_panels: int, *, narrow: bool) -> int:
    return min(num_panels, 2 if narrow else 4)


def _counted(shown: Sequence[Site], drawn: Sequence[Site]) -> str:
    if len(shown) == len(drawn):
        return "All sites that were observed" if len(shown) > 1 else "One site"
    return f"{len(shown)} of {len(drawn)} sites, with the one that keeps least"


def _text(site: Site) -> str:
    kept = f", {kept_percent(site.energy_kept)} of the energy" if site.energy_kept else ""
    return f"{site.name} keeps {site.keep_dim} of {site.dim} components{kept}"


def _floor(sites: Sequence[Site]) -> float:
    """Return the lowest power of ten to draw; values below are mostly rounding errors."""
    values = [value for site in sites for _, value in site.points]
    low = math.floor(math.log10(float(np.quantile(values, _TAIL))))
    return min(-1.0, max(_FLOOR, low))


def _powers(low: float) -> list[int]:
    step = max(1, round(-low / 3))
    return list(range(0, int(low) - 1, -step))


def _power(exponent: float) -> str:
    return "10" + str(round(exponent)).translate(_SUPERSCRIPTS) if round(exponent) else "1"


def _binned(site: Site, low: float) -> NDArray[np.float64]:
    components, values = np.array(site.points, dtype=np.float64).T
    places = np.linspace(1.0, site.dim, _BINS)
    heights = np.maximum(np.log10(values), low)
    return np.asarray(np.interp(places, components, heights, right=low), dtype=np.float64)
