"""A budget and what each cut costs -> how much of what to keep."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from planners.cost import (
    dense_start,
    layer_parameters,
    model_parameters,
)
from planners.errors import NumericsError, PlanError
from planners.plan import LayerForm, ModelForm, ModelShape, Start

BISECTIONS = 60  # of a share in [0, 1]: finer than any width
LOG_NOTHING = 40.0  # e^-40 of a width is less than rounding


def largest_width(
    widths: Sequence[int], count: Callable[[int], int], *, before: int, keep_fraction: float
) -> int:
    """Return the widest of ``widths`` that stays within the budget.

    Args:
        widths: candidates, ascending.
        count: width -> parameters of the whole model; does not fall with the width.
        before: parameters of the input model.
        keep_fraction: target, parameters after over parameters before.

    Raises:
        PlanError: even the narrowest candidate is over the budget; the message says how small it
            can get.
    """
    low, high = 0, len(widths)
    while low < high:
        middle = (low + high) // 2
        if count(widths[middle]) <= keep_fraction * before:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        _refuse(count(widths[0]) / before, keep_fraction)
    return widths[low - 1]


# The inner widths that a modular method may cut, and the step of each: rope pairs stay whole.
QUANTUM = {"qk": 2, "vo": 1}
FIELD = {"mlp": "intermediate", "qk": "qk_head_dim", "vo": "vo_head_dim"}
Widths = dict[str, int]


def full_widths(shape: ModelShape) -> Widths:
    """Return module -> inner width before compression."""
    return {"mlp": shape.intermediate, "qk": shape.head_dim, "vo": shape.head_dim}


def layer_widths(layer: LayerForm) -> Widths:
    """Return module -> inner width of a layer."""
    return {module: getattr(layer, field) for module, field in FIELD.items()}


def cut_layer(layer: LayerForm, widths: Mapping[str, int]) -> LayerForm:
    """Return a layer with these inner widths; a cut v moves its bias into o's."""
    moved = layer.v_bias and widths["vo"] < layer.vo_head_dim
    return replace(
        layer,
        intermediate=widths["mlp"],
        qk_head_dim=widths["qk"],
        vo_head_dim=widths["vo"],
        v_bias=layer.v_bias and not moved,
        o_bias=layer.o_bias or moved,
    )


def form_of(
    shape: ModelShape, widths: Sequence[Mapping[str, int]], start: Start | None = None
) -> ModelForm:
    """Return the model whose layers have these inner widths.

    Args:
        shape: of the model.
        widths: of each layer, module -> inner width.
        start: what is cut; None is the model that nothing touched.
    """
    form = (start or dense_start(shape)).form
    layers = (cut_layer(*pair) for pair in zip(form.layers, widths, strict=False))
    return replace(form, layers=tuple(layers), native=False)


def rounded(full: int, module: str, width: float, *, round_to: int) -> int:
    """Return the nearest width that a module's step allows, at least one step, at most ``full``."""
    step = QUANTUM.get(module, round_to)
    if width >= full:
        return full
    return min(full, max(step, step * math.floor(width / step + 0.5)))


def uniform(
    shape: ModelShape,
    *,
    keep_fraction: float,
    modules: Sequence[str],
    round_to: int,
    alike: bool = False,
    start: Start | None = None,
) -> ModelForm:
    """Return the largest model within the budget whose layers all keep one share of each width.

    Where all take their next step at the same share, only as many take it as the budget demands,
    unless they must be ``alike``.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    start = start or dense_start(shape)
    whole = [layer_widths(layer) for layer in start.form.layers]

    def form(share: float) -> ModelForm:
        cut = [
            full | {m: rounded(full[m], m, share * full[m], round_to=round_to) for m in modules}
            for full in whole
        ]
        return form_of(shape, cut, start)

    if alike:
        return largest_share(shape, form, keep_fraction=keep_fraction, start=start)
    return _between(shape, form, keep_fraction=keep_fraction, round_to=round_to, start=start)


def by_influence(  # noqa: PLR0913 the formula has as many
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    *,
    keep_fraction: float,
    modules: Sequence[str],
    round_to: int,
    temperature: float,
    start: Start | None = None,
) -> ModelForm:
    """Return widths by Block Influence: layer i loses ``c * softmax(-s_i / temperature)``.

    MoDeGPT eq. 10-11 (arXiv:2408.09632); c is chosen so that the true budget is met. Where several
    widths take their next step at the same c, only as many take it as the budget demands.

    Args:
        shape: of the model.
        findings: of each layer, ``influence``: 1 - mean cosine between its input and output.
        keep_fraction: target, whole model.
        modules: which take part.
        round_to: step of the FFN width.
        temperature: of the softmax; influence is between 0 and 2.
        start: what is cut; None is the model that nothing touched.

    Raises:
        NumericsError: an influence is not finite.
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    scores = [_influence(i, finding["influence"]) for i, finding in enumerate(findings)]
    least, most = min(scores), max(scores)
    start = start or dense_start(shape)
    whole = [layer_widths(layer) for layer in start.form.layers]
    # c on a logarithmic scale: from where no width loses anything to where all lose everything.
    span = (most - least) / temperature + LOG_NOTHING

    def form(share: float) -> ModelForm:
        removed = [
            math.exp(min(0.0, (1 - share) * span - LOG_NOTHING - (score - least) / temperature))
            for score in scores
        ]
        cut = [
            full | {m: rounded(full[m], m, (1 - r) * full[m], round_to=round_to) for m in modules}
            for r, full in zip(removed, whole, strict=True)
        ]
        return form_of(shape, cut, start)

    return _between(shape, form, keep_fraction=keep_fraction, round_to=round_to, start=start)


def marginal(
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    *,
    keep_fraction: float,
    round_to: int,
    start: Start | None = None,
) -> ModelForm:
    """Return widths that spend the budget where a parameter costs the least measured damage.

    Each module of each layer has a curve from parameters removed to damage. Its lower convex hull
    is walked one step at a time, always the segment with the least damage per parameter next, until
    the budget is met. So a larger budget never makes any width smaller.

    Args:
        shape: of the model.
        findings: of each layer, ``curves``: module -> [[width, damage], ...] with the full width
            at damage 0.
        keep_fraction: target, whole model.
        round_to: step of the FFN width.
        start: what is cut; None is the model that nothing touched.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    start = start or dense_start(shape)
    segments = sorted(
        (slope, layer, module, low)
        for layer, finding in enumerate(findings)
        for module, curve in _curves(finding).items()
        for slope, low in _hull(_price(shape, start.form.layers[layer], module), curve)
    )
    path = [(layer, module, low) for _, layer, module, low in segments]
    whole = [layer_widths(layer) for layer in start.form.layers]
    return _walked(shape, whole, path, keep_fraction=keep_fraction, round_to=round_to, start=start)


def require_levels(
    shape: ModelShape,
    *,
    keep_fraction: float,
    modules: Sequence[str],
    shares: Sequence[float],
    round_to: int,
    start: Start | None = None,
) -> None:
    """See that `marginal` can meet a budget, before anything is measured.

    Raises:
        PlanError: it is below the lowest levels of all modules; the message says how small it can
            get.
    """
    start = start or dense_start(shape)
    lowest = []
    for layer in start.form.layers:
        full = layer_widths(layer)
        least = {
            m: min(levels(full[m], m, shares, round_to=round_to), default=full[m]) for m in modules
        }
        lowest.append(full | least)
    smallest = model_parameters(shape, form_of(shape, lowest, start))
    if smallest > _budget(start, keep_fraction):
        _refuse(smallest / start.parameters_before, keep_fraction)


def levels(full: int, module: str, shares: Sequence[float], *, round_to: int) -> list[int]:
    """Return the widths at which the damage of a module is measured, descending, each once."""
    found = {rounded(full, module, share * full, round_to=round_to) for share in shares}
    return sorted(found - {full}, reverse=True)


def _hull(price: int, curve: Sequence[tuple[int, float]]) -> list[tuple[float, int]]:
    """Return the segments of a curve's lower convex hull as (damage per parameter, lower width).

    ``price`` is what one unit of the width holds in parameters.
    """
    full = curve[0][0]
    points = [((full - width) * price, max(damage, 0.0), width) for width, damage in curve]
    hull: list[tuple[float, float, int]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b), b[2]) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _price(shape: ModelShape, layer: LayerForm, module: str) -> int:
    """Return the parameters that one unit of a module's inner width holds in one layer."""
    if module == "mlp":
        return 2 * layer.residual_mid + layer.residual_out + 2 * int(shape.mlp_bias)
    if module == "vo":
        return shape.num_kv_heads * layer.residual_in + shape.num_heads * layer.residual_mid
    return (shape.num_heads + shape.num_kv_heads) * (layer.residual_in + int(shape.qkv_bias))


def _curves(finding: Mapping[str, object]) -> dict[str, list[tuple[int, float]]]:
    curves = finding["curves"]
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves is a {type(curves).__name__}")
    return {
        str(module): sorted(((int(w), float(d)) for w, d in curve), reverse=True)
        for module, curve in curves.items()
    }


def _between(
    shape: ModelShape,
    form: Callable[[float], ModelForm],
    *,
    keep_fraction: float,
    round_to: int,
    start: Start,
) -> ModelForm:
    """Return the largest form of a family in the budget, with what the next larger one has more.

    The widths that differ between the two are cut one by one, the last layer first, only as far as
    the budget demands.
    """
    within, over = bracket(shape, form, keep_fraction=keep_fraction, start=start)
    small, large = (
        [layer_widths(layer) for layer in form(share).layers] for share in (within, over)
    )
    path = [
        (layer, module, small[layer][module])
        for layer in reversed(range(len(large)))
        for module in large[layer]
        if small[layer][module] < large[layer][module]
    ]
    return _walked(shape, large, path, keep_fraction=keep_fraction, round_to=round_to, start=start)


def _walked(
    shape: ModelShape,
    widths: Sequence[Mapping[str, int]],
    path: Sequence[tuple[int, str, int]],
    *,
    keep_fraction: float,
    round_to: int,
    start: Start,
) -> ModelForm:
    """Return the largest model within the budget on a path of cuts (layer, module, width).

    Each cut is taken in whole steps, and only as far as the budget demands.

    Raises:
        PlanError: the end of the path is over the budget; the message says how small it can get.
    """
    budget = _budget(start, keep_fraction)
    found = [dict(layer) for layer in widths]
    count = model_parameters(shape, form_of(shape, found, start))

    def layer_count(layer: int, widths: Mapping[str, int]) -> int:
        return layer_parameters(shape, cut_layer(start.form.layers[layer], widths))

    for layer, module, low in path:
        if count <= budget:
            break
        step = QUANTUM.get(module, round_to)
        rest = count - layer_count(layer, found[layer])
        # What is between two steps, as a full width may be, is the first to go.
        steps = [low, *range((low // step + 1) * step, found[layer][module], step)]

        def fits(width: int, layer: int = layer, module: str = module, rest: int = rest) -> bool:
            return rest + layer_count(layer, found[layer] | {module: width}) <= budget

        # Parameters grow with the width, so those that fit come first.
        found[layer][module] = steps[
            max(0, bisect_left(steps, True, key=lambda w: not fits(w)) - 1)
        ]
        count = rest + layer_count(layer, found[layer])
    if count > budget:
        _refuse(count / start.parameters_before, keep_fraction)
    return form_of(shape, found, start)


def largest_share(
    shape: ModelShape,
    form: Callable[[float], ModelForm],
    *,
    keep_fraction: float,
    start: Start,
) -> ModelForm:
    """Return the largest of a family of forms, growing with a share in [0, 1], in the budget."""
    return form(bracket(shape, form, keep_fraction=keep_fraction, start=start)[0])


def bracket(
    shape: ModelShape,
    form: Callable[[float], ModelForm],
    *,
    keep_fraction: float,
    start: Start,
) -> tuple[float, float]:
    """Return a share within the budget and the next one over it; twice 1.0 where all is within."""
    budget = _budget(start, keep_fraction)
    smallest = model_parameters(shape, form(0.0))
    if smallest > budget:
        _refuse(smallest / start.parameters_before, keep_fraction)
    low, high = 0.0, 1.0
    if model_parameters(shape, form(high)) <= budget:
        return high, high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if model_parameters(shape, form(middle)) <= budget:
            low = middle
        else:
            high = middle
    return low, high


def _budget(start: Start, keep_fraction: float) -> int:
    """Return the most parameters that may stay; a fraction written as a float may be a hair off."""
    return math.floor(keep_fraction * start.parameters_before + 1e-6)


def _refuse(smallest: float, keep_fraction: float) -> None:
    raise PlanError(
        f"keep_fraction {keep_fraction} cannot be met: the smallest result of this method "
        f"keeps {smallest:.4f} of the parameters",
        hint=f"use --keep-fraction {smallest + 5e-5:.4f} or more",
    )


def _influence(layer: int, value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise NumericsError(f"layer {layer}: its influence is {value!r}, which is no number")
    return float(value)
