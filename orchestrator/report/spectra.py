"""The PCA spectrum of every site, where it was cut, and how much energy that kept."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from orchestrator.report.document import Site
from orchestrator.report.numbers import between, counted, kept_percent, percent
from orchestrator.report.svg import (
    CUT,
    INK,
    KEPT,
    MUTED,
    Plot,
    Sheet,
    Words,
    draw,
    label,
    number_axis,
)

MAX_PANELS = 12
CHOSEN_PANELS = 8

_WHERE = {
    "attention": ("o", "dot", KEPT),
    "mlp": ("s", "square", CUT),
    "head": ("D", "diamond", INK),
    "site": ("o", "dot", MUTED),
}
_BINS = 64
_FLOOR = -9.0
_TAIL = 0.03
_SHADE = "#4f86e8"
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
        columns = _columns(len(shown), narrow=sheet.narrow)
        grid = sheet.figure.subplots(
            math.ceil(len(shown) / columns), columns, sharey=True, squeeze=False
        )
        for position, axes in enumerate(grid.flat):
            if position < len(shown):
                _spectrum(axes, shown[position], low)
                axes.set_title(_titled(shown[position], narrow=sheet.narrow), pad=4)
            else:
                axes.set_axis_off()

    def height(narrow: bool) -> float:
        return 1.35 * math.ceil(len(shown) / _columns(len(shown), narrow=narrow)) + 0.1

    return draw(words, paint, height=height)


def depth_map(sites: Sequence[Site]) -> Plot | None:
    """Return a heat map of all spectra by site; None if the panels show all sites."""
    drawn = [site for site in sites if site.points and site.dim]
    if len(drawn) <= MAX_PANELS:
        return None
    low = _floor(drawn)
    picture = np.array([_binned(site, low) for site in drawn]).T
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
        axes = sheet.figure.subplots()
        first, last = drawn[0].index - 0.5, drawn[-1].index + 0.5
        axes.imshow(
            picture,
            cmap=_shades(),
            vmin=low,
            vmax=0.0,
            origin="lower",
            aspect="auto",
            interpolation="none",
            extent=(first, last, 0.0, 1.0),
        )
        edges = np.linspace(first, last, len(drawn) + 1)
        axes.stairs(cuts, edges, baseline=None, color=CUT, linewidth=1.6)
        axes.set_xlabel("site")
        axes.set_ylabel("components")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * 100:.0f} %"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if sheet.narrow else 12))

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
        legend=tuple((where, _WHERE[where][2], _WHERE[where][1]) for where in kinds),
    )

    def paint(sheet: Sheet) -> None:
        axes = sheet.figure.subplots()
        axes.grid(axis="y")
        size = min(5.0, max(1.6, (200.0 if sheet.narrow else 600.0) / len(drawn)))
        for where in kinds:
            mine = [(site.index, kept) for site, kept in drawn if site.where == where]
            marker, _, colour = _WHERE[where]
            places, values = zip(*mine, strict=True)
            axes.plot(places, values, marker, color=colour, markersize=size, markeredgewidth=0)
        number_axis(axes, [site.index for site, _ in drawn])
        bottom = max(0.0, least - 0.15 * (1.0 - least) - 1e-6)
        axes.set_ylim(bottom, 1.0 + 0.05 * (1.0 - bottom))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * 100:.6g} %"))
        axes.set_xlabel("site")

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


def _spectrum(axes: Axes, site: Site, low: float) -> None:
    components, values = np.array(site.points, dtype=np.float64).T
    kept = components <= site.keep_dim
    # The two lines share a point, so that the curve has no gap at the cut.
    joint = kept | np.roll(kept, 1)
    joint[0] = kept[0]
    axes.plot(components[joint], values[joint], color=KEPT)
    axes.plot(components[~kept], values[~kept], color=CUT)
    if site.keep_dim < site.dim:
        axes.axvline(site.keep_dim, color=INK, linestyle=(0, (3, 2)), linewidth=0.9)
        axes.axvspan(site.keep_dim, site.dim, color=CUT, alpha=0.1)
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 3.0)
    axes.set_xlim(1, max(site.dim, 2))
    axes.set_xticks([1, site.dim])
    axes.yaxis.set_major_locator(FixedLocator([10.0**power for power in _powers(low)]))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _power(math.log10(y))))
    axes.grid(axis="y")
    if site.energy_kept is not None:
        # Between the two tick labels, where no curve can cross it.
        axes.set_xlabel(f"{kept_percent(site.energy_kept)} kept", fontsize=8.5, labelpad=-8.5)


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


def _shades() -> ListedColormap:
    """Return a colour map of one hue with rising opacity, for light and dark pages."""
    red, green, blue = to_rgb(_SHADE)
    return ListedColormap([(red, green, blue, a) for a in np.linspace(0.04, 1.0, 256).tolist()])
