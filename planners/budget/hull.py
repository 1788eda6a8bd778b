"""Allocate widths by the measured damage of cuts, of one method or of several.

Each module of each layer has one curve from what is saved to damage, with the levels of all methods
that can shrink it. The segments of its lower convex hull are taken in the order of least damage for
what they save, until the budget is met. That also chooses the method for each module of each
layer: the one that its last level belongs to.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from planners.budget.budgets import Budget
from planners.budget.schemes import ATTENTION
from planners.budget.spend import Choice, shrunk, spend_budget
from planners.budget.widths import FIELD, Steps, layer_widths, width_ladder
from planners.method import Allocation, Ladder
from planners.model.cost import dense_start
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.shape import ModelShape

Ladders = Mapping[str, Mapping[str, Ladder]]  # method -> module -> its ladder
Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]  # method -> module -> levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A cut with measured damage.

    Attributes:
        saved: of what the budget counts.
        damage: as measured.
        choice: the cut; None is the uncut module.
    """

    saved: float
    damage: float
    choice: Choice | None


def by_measured_damage(
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    *,
    budget: Budget,
    steps: Steps,
    start: Start | None = None,
) -> ModelForm:
    """Return inner widths within the budget that remove parameters where damage is least.

    A larger budget never makes any width smaller.

    Args:
        shape: of the model.
        findings: of each layer, ``curves``: module -> [[width, damage], ...] with the full width
            at damage 0.
        budget: of the whole model.
        steps: of the widths.
        start: the model that is cut; the uncompressed one if None.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    start = start or dense_start(shape)
    curves, ladders = [], []
    for layer, finding in zip(start.form.layers, findings, strict=True):
        known = read_curves(finding["curves"])
        full = layer_widths(layer)
        found = {
            module: width_ladder(full[module], module, (), step=steps[module])
            for module in known
            if module in FIELD
        }
        if budget.ties_heads and {"qk", "vo"} <= found.keys():
            known, found = tied_heads(known, found)
        curves.append({"": known})
        ladders.append({"": found})
    return cheapest(curves, ladders, budget=budget, start=start).form


def tied_heads(
    curves: Mapping[str, list[tuple[int, float]]], ladders: Mapping[str, Ladder]
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Ladder]]:
    """Return curves and ladders in which q/k and v/o are cut together, to one width.

    The damage is the sum of both, at the widths at which either was measured.
    """
    qk, vo = (sorted(curves[module]) for module in ("qk", "vo"))
    least = max(qk[0][0], vo[0][0])
    both, single = ladders["qk"], ladders["vo"]
    assert isinstance(both.sizes, range)  # widths alone
    assert isinstance(single.sizes, range)
    step = max(both.sizes.step, single.sizes.step)
    known = {width for width, _ in (*qk, *vo) if width >= least}
    widths = sorted(w for w in known if w % step == 0 or w == both.whole)

    def cut(layer: LayerForm, width: int) -> LayerForm:
        return single.cut(both.cut(layer, width), width)

    tied = Ladder(
        sizes=range(step, both.whole, step), whole=both.whole, levels=both.levels, cut=cut
    )
    damages = [(width, damage_at(qk, width) + damage_at(vo, width)) for width in widths]
    rest = {"mlp"} & ladders.keys()
    return (
        {"qk": damages} | {name: list(curves[name]) for name in rest},
        {"qk": tied} | {name: ladders[name] for name in rest},
    )


def damage_at(curve: Sequence[tuple[int, float]], width: int) -> float:
    """Return the damage at a width, on the straight line between the levels beside it."""
    points = sorted(curve)
    place = bisect_left(points, width, key=lambda point: point[0])
    if place == 0 or points[min(place, len(points) - 1)][0] == width:
        return points[place][1]
    (low, high_damage), (high, low_damage) = points[place - 1], points[place]
    return high_damage + (low_damage - high_damage) * (width - low) / (high - low)


def cheapest(
    curves: Sequence[Curves], ladders: Sequence[Ladders], *, budget: Budget, start: Start
) -> Allocation:
    """Return the widths and ranks of every layer, and the method of each module.

    Args:
        curves: of each layer, the measured sizes of the ladders with their damage. The uncut
            module has none.
        ladders: of each layer.
        budget: of the whole model.
        start: the model that is cut.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    measured: dict[tuple[int, str], list[Level]] = {}
    for index, (of_layer, known) in enumerate(zip(ladders, curves, strict=True)):
        for method, named in of_layer.items():
            for name, ladder in named.items():
                module = ladder.module or name
                found = measured.setdefault((index, module), [_whole()])
                found += [
                    _level(budget, start.form.layers[index], module, Choice(
                        ladder=ladder, size=size, method=method), damage)
                    for size, damage in known[method].get(name, ())
                    if ladder.cuts(size)
                ]  # fmt: skip
    segments = [
        (slope, layer, module, choice)
        for (layer, module), found in measured.items()
        for slope, choice in lower_hull(found)
    ]
    segments.sort(key=lambda segment: segment[:3])

    def loss(layer: int, module: str, choice: Choice) -> float:
        own = _level(budget, start.form.layers[layer], module, choice, 0.0)
        return _between_levels(measured[layer, module], own)

    path = [(layer, module, choice) for _, layer, module, choice in segments]
    none: list[dict[str, Choice]] = [{} for _ in start.form.layers]
    chosen = spend_budget(budget, none, path, start=start, loss=loss)
    if budget.fills:
        _fill(chosen, measured, budget=budget, start=start)
    form = replace(start.form, layers=tuple(shrunk(start, chosen)), native=False)
    makers = tuple({m: c.method for m, c in sorted(layer.items())} for layer in chosen)
    damage = sum(loss(i, m, c) for i, layer in enumerate(chosen) for m, c in layer.items())
    return Allocation(form=form, makers=makers, damage=damage)


def _fill(
    chosen: Sequence[dict[str, Choice]],
    measured: Mapping[tuple[int, str], Sequence[Level]],
    *,
    budget: Budget,
    start: Start,
) -> None:
    """Spend what is left of a budget on the levels that take most damage away for it.

    The path ends with a step that may save more than was needed: a module has few schemes.
    """
    costs = [budget.layer(form) for form in shrunk(start, chosen)]
    left = budget.limit - budget.outside(start.form) - sum(costs)
    while True:
        better = [
            found
            for key, levels in measured.items()
            if key[1] in chosen[key[0]]
            for found in _better(key, levels, chosen, budget=budget, start=start)
            if found.more <= left
        ]
        if not better:
            return
        best = max(better, key=lambda each: each.gain)
        left -= best.more
        if best.level.choice is None:
            del chosen[best.layer][best.module]
        else:
            chosen[best.layer][best.module] = best.level.choice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Better:
    """A level with less damage than the present one, for ``more`` of what the budget counts."""

    layer: int
    module: str
    level: Level
    more: float
    gain: float


def _better(
    key: tuple[int, str],
    levels: Sequence[Level],
    chosen: Sequence[Mapping[str, Choice]],
    *,
    budget: Budget,
    start: Start,
) -> Iterator[_Better]:
    layer, module = key
    own = _level(budget, start.form.layers[layer], module, chosen[layer][module], 0.0)
    damage = _between_levels(levels, own)
    for level in levels:
        if level.damage < damage:
            more = own.saved - level.saved
            gain = (damage - level.damage) / max(more, 1e-9)
            yield _Better(layer=layer, module=module, level=level, more=more, gain=gain)


def tied_schemes(
    curves: Mapping[str, Sequence[tuple[int, float]]], ladders: Mapping[str, Ladder]
) -> tuple[dict[str, Sequence[tuple[int, float]]], dict[str, Ladder]]:
    """Return curves and ladders in which q, k, v and o are one module, with one scheme.

    For each scheme its levels are those on the way from the widest heads to the narrowest, along
    the lower hulls of q and k and of v and o; their damages add up.
    """
    known = {name: curve for name, curve in curves.items() if _module(name) == "mlp"}
    found = {name: ladder for name, ladder in ladders.items() if _module(name) == "mlp"}
    names = dict.fromkeys(name.partition(" ")[2] for name in ladders)
    for scheme in names:
        both = [f"{module} {scheme}".strip() for module in ("qk", "vo")]
        steps = [_steps(ladders[name], curves[name]) for name in both if name in ladders]
        if not steps:
            continue
        name = f"{ATTENTION} {scheme}".strip()
        found[name], known[name] = _combined(steps)
    return known, found


def _module(name: str) -> str:
    return name.partition(" ")[0]


def _steps(
    ladder: Ladder, curve: Sequence[tuple[int, float]]
) -> tuple[Ladder, list[tuple[int, float]]]:
    """Return the sizes on the lower hull of damage by size, the largest first."""
    hull: list[tuple[int, float]] = []
    for size, damage in sorted(curve, reverse=True):
        while len(hull) > 1 and (
            (hull[-1][1] - hull[-2][1]) * (hull[-2][0] - size)
            >= (damage - hull[-2][1]) * (hull[-2][0] - hull[-1][0])
        ):
            hull.pop()
        hull.append((size, damage))
    return ladder, hull


def _combined(
    parts: Sequence[tuple[Ladder, list[tuple[int, float]]]],
) -> tuple[Ladder, list[tuple[int, float]]]:
    """Return the ladder of several modules that are cut in turn, and its curve.

    The shares of the whole that each loses for equal damage are compared, as their sizes differ.
    """
    places = [0] * len(parts)
    rows = [tuple(hull[0][0] for _, hull in parts)]
    damages = [sum(hull[0][1] for _, hull in parts)]
    while True:
        slopes = []
        for index, (ladder, hull) in enumerate(parts):
            at = places[index]
            if at + 1 < len(hull):
                share = (hull[at][0] - hull[at + 1][0]) / ladder.whole
                slopes.append(((hull[at + 1][1] - hull[at][1]) / share, index))
        if not slopes:
            break
        places[min(slopes)[1]] += 1
        now = [hull[at] for (_, hull), at in zip(parts, places, strict=True)]
        rows.append(tuple(size for size, _ in now))
        damages.append(sum(damage for _, damage in now))
    last = len(rows) - 1
    first = parts[0][0]

    def cut(layer: LayerForm, size: int) -> LayerForm:
        for (ladder, _), own in zip(parts, rows[last - size], strict=True):
            if ladder.cuts(own):
                layer = ladder.cut(layer, own)
        return layer

    whole = last if first.scheme is None else last + 1
    ladder = Ladder(
        sizes=range(last + 1), whole=whole, levels=tuple(range(last, -1, -1)), cut=cut,
        module=ATTENTION, scheme=first.scheme,
    )  # fmt: skip
    return ladder, [(last - place, damage) for place, damage in enumerate(damages)]


def require_levels(ladders: Sequence[Ladders], *, budget: Budget, start: Start) -> None:
    """Check that a budget can be met, before anything is measured.

    Raises:
        PlanError: it is below the lowest levels of all modules; the message says how small it can
            get.
    """
    smallest = lowest(ladders, budget=budget, start=start)
    if not budget.allows(smallest):
        budget.refuse(budget.cost(smallest))


def lowest(ladders: Sequence[Ladders], *, budget: Budget, start: Start) -> ModelForm:
    """Return the cheapest model that the levels of these ladders can reach."""

    def cost(layer: LayerForm, choice: Choice) -> float:
        return budget.layer(choice.ladder.cut(layer, choice.size))

    chosen: list[dict[str, Choice]] = []
    for layer, of_layer in zip(start.form.layers, ladders, strict=True):
        found: dict[str, Choice] = {}
        for method, named in of_layer.items():
            for name, ladder in named.items():
                if not ladder.levels:
                    continue
                module = ladder.module or name
                choice = Choice(ladder=ladder, size=ladder.levels[-1], method=method)
                known = found.get(module)
                if known is None or cost(layer, choice) < cost(layer, known):
                    found[module] = choice
        chosen.append(found)
    return replace(start.form, layers=tuple(shrunk(start, chosen)))


def lower_hull(levels: Sequence[Level]) -> list[tuple[float, Choice]]:
    """Return the segments of a curve's lower convex hull: damage for what it saves, and end point.

    The slopes ascend. Of levels that save equally much, only the one with least damage counts.
    """
    hull: list[Level] = []
    # Sorting is stable: of equal levels the first-named method wins.
    for level in sorted(levels, key=lambda level: (level.saved, level.damage)):
        if hull and level.saved == hull[-1].saved:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], level):
            hull.pop()
        hull.append(level)
    ends = [(_slope(a, b), b.choice) for a, b in pairwise(hull) if b.choice is not None]
    # Of levels on one line, rounding may make a later slope the smaller one.
    slopes = accumulate((slope for slope, _ in ends), max)
    return [(slope, choice) for slope, (_, choice) in zip(slopes, ends, strict=True)]


def read_curves(found: object) -> dict[str, list[tuple[int, float]]]:
    """Return module -> (size, damage) as measured by a unit.

    Raises:
        TypeError: ``found`` is not a mapping.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"curves is a {type(found).__name__}")
    return {str(m): [(int(size), float(damage)) for size, damage in c] for m, c in found.items()}


def _whole() -> Level:
    return Level(saved=0, damage=0.0, choice=None)


def _level(budget: Budget, layer: LayerForm, module: str, choice: Choice, damage: float) -> Level:
    cut = choice.ladder.cut(layer, choice.size)
    saved = budget.module(layer, module) - budget.module(cut, module)
    return Level(saved=saved, damage=max(damage, 0.0), choice=choice)


def _slope(a: Level, b: Level) -> float:
    return (b.damage - a.damage) / (b.saved - a.saved)


def _between_levels(levels: Sequence[Level], wanted: Level) -> float:
    """Return the damage of a cut on the straight line between two levels of its own method."""
    assert wanted.choice is not None  # the uncut module is never estimated
    key = wanted.choice.key
    own = [level for level in levels if level.choice is None or level.choice.key == key]
    own.sort(key=lambda level: level.saved)
    place = min(bisect_left(own, wanted.saved, key=lambda level: level.saved), len(own) - 1)
    if place == 0 or own[place].saved == wanted.saved:
        return own[place].damage
    before, after = own[place - 1], own[place]
    return before.damage + _slope(before, after) * (wanted.saved - before.saved)
