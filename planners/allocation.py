"""A budget and what each cut costs -> how much of what to keep."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from planners.cost import dense_model_form, dense_parameters, model_parameters
from planners.errors import PlanError
from planners.plan import ModelForm, ModelShape, dense_form

BISECTIONS = 60  # of a share in [0, 1]: finer than any width


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


def form_of(shape: ModelShape, widths: Sequence[Mapping[str, int]]) -> ModelForm:
    """Return the model whose layers have these inner widths; a cut v moves its bias into o's."""
    layers = []
    for layer in widths:
        moved = shape.qkv_bias and layer["vo"] < shape.head_dim
        layers.append(
            replace(
                dense_form(shape),
                intermediate=layer["mlp"],
                qk_head_dim=layer["qk"],
                vo_head_dim=layer["vo"],
                v_bias=shape.qkv_bias and not moved,
                o_bias=shape.o_bias or moved,
            )
        )
    return replace(dense_model_form(shape), layers=tuple(layers), native=False)


def rounded(shape: ModelShape, module: str, width: float, *, round_to: int) -> int:
    """Return the nearest width that a module's step allows, at least one step, at most all."""
    full = full_widths(shape)[module]
    step = QUANTUM.get(module, round_to)
    if width >= full:
        return full
    return min(full, max(step, step * math.floor(width / step + 0.5)))


def uniform(
    shape: ModelShape, *, keep_fraction: float, modules: Sequence[str], round_to: int
) -> ModelForm:
    """Return the largest model within the budget whose layers all keep one share of each width.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """

    def form(share: float) -> ModelForm:
        full = full_widths(shape)
        cut = {m: rounded(shape, m, share * full[m], round_to=round_to) for m in modules}
        return form_of(shape, [full | cut] * shape.num_layers)

    return largest_share(shape, form, keep_fraction=keep_fraction)


def by_influence(
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    *,
    keep_fraction: float,
    modules: Sequence[str],
    round_to: int,
    temperature: float,
) -> ModelForm:
    """Return widths by Block Influence: layer i loses ``c * softmax(-s_i / temperature)``.

    MoDeGPT eq. 10-11 (arXiv:2408.09632); c is chosen so that the true budget is met, and what
    rounding leaves is handed back one step at a time.

    Args:
        shape: of the model.
        findings: of each layer, ``influence``: 1 - mean cosine between its input and output.
        keep_fraction: target, whole model.
        modules: which take part.
        round_to: step of the FFN width.
        temperature: of the softmax; influence is between 0 and 2.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    scores = [_number(finding["influence"]) for finding in findings]
    least = min(scores)
    weights = [math.exp((least - score) / temperature) for score in scores]
    mean = sum(weights) / len(weights)
    full = full_widths(shape)

    def wanted(share: float) -> list[dict[str, float]]:
        # From nothing removed at share 1 to everything at 0, each layer in its proportion.
        removed = [min(1.0, (1 / max(share, 1e-9) - 1) * w / mean) for w in weights]
        return [{m: (1 - r) * full[m] for m in modules} for r in removed]

    def form(share: float) -> ModelForm:
        return form_of(shape, [
            full | {m: rounded(shape, m, w, round_to=round_to) for m, w in layer.items()}
            for layer in wanted(share)
        ])  # fmt: skip

    found = largest_share(shape, form, keep_fraction=keep_fraction)
    return _hand_back(shape, found, keep_fraction=keep_fraction, modules=modules, round_to=round_to)


def marginal(
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    *,
    keep_fraction: float,
    round_to: int,
) -> ModelForm:
    """Return widths that spend the budget where a parameter costs the least measured damage.

    Each module of each layer has a curve from parameters removed to damage. Its lower convex hull
    is walked one step at a time, always the segment with the least damage per parameter next, until
    the budget is met; steps that turn out not to be needed are handed back.

    Args:
        shape: of the model.
        findings: of each layer, ``curves``: module -> [[width, damage], ...] with the full width
            at damage 0.
        keep_fraction: target, whole model.
        round_to: step of the FFN width.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    budget = _budget(shape, keep_fraction)
    full = full_widths(shape)
    widths = [dict(full) for _ in findings]
    segments = sorted(
        (slope, layer, module, low)
        for layer, finding in enumerate(findings)
        for module, curve in _curves(finding).items()
        for slope, low in _hull(shape, module, curve)
    )
    count = model_parameters(shape, form_of(shape, widths))
    for _, layer, module, low in segments:
        if count <= budget:
            break
        step = QUANTUM.get(module, round_to)
        price = _price(shape, module)
        left = widths[layer][module] - low
        # Enough steps to meet the budget, or the whole segment.
        needed = math.ceil((count - budget) / (price * step)) * step
        width = widths[layer][module] - min(left, needed)
        widths[layer][module] = max(low, rounded(shape, module, width, round_to=round_to))
        count = model_parameters(shape, form_of(shape, widths))
    if count > budget:
        _refuse(count / dense_parameters(shape), keep_fraction)
    last = [module for _, _, module, _ in segments]
    return _hand_back(
        shape,
        form_of(shape, widths),
        keep_fraction=keep_fraction,
        modules=tuple(dict.fromkeys(last)),
        round_to=round_to,
    )


def levels(shape: ModelShape, module: str, shares: Sequence[float], *, round_to: int) -> list[int]:
    """Return the widths at which the damage of a module is measured, descending, each once."""
    full = full_widths(shape)[module]
    found = {rounded(shape, module, share * full, round_to=round_to) for share in shares}
    return sorted(found - {full}, reverse=True)


def _hull(
    shape: ModelShape, module: str, curve: Sequence[tuple[int, float]]
) -> list[tuple[float, int]]:
    """Return the segments of a curve's lower convex hull as (damage per parameter, lower width)."""
    price = _price(shape, module)
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


def _price(shape: ModelShape, module: str) -> int:
    """Return the parameters that one unit of a module's inner width holds in one layer."""
    heads = shape.num_heads + shape.num_kv_heads
    if module == "mlp":
        return 3 * shape.hidden + 2 * int(shape.mlp_bias)
    bias = heads * int(shape.qkv_bias) if module == "qk" else 0
    return heads * shape.hidden + bias


def _curves(finding: Mapping[str, object]) -> dict[str, list[tuple[int, float]]]:
    curves = finding["curves"]
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves is a {type(curves).__name__}")
    return {
        str(module): sorted(((int(w), float(d)) for w, d in curve), reverse=True)
        for module, curve in curves.items()
    }


def _hand_back(
    shape: ModelShape,
    form: ModelForm,
    *,
    keep_fraction: float,
    modules: Sequence[str],
    round_to: int,
) -> ModelForm:
    """Widen modules one step at a time while the budget allows, the most cut ones first."""
    full = full_widths(shape)
    widths = [{m: getattr(layer, FIELD[m]) for m in full} for layer in form.layers]
    room = _budget(shape, keep_fraction) - model_parameters(shape, form)
    cut = [
        (widths[i][m] / full[m], i, m)
        for i in range(len(widths))
        for m in modules
        if widths[i][m] < full[m]
    ]
    for _, layer, module in sorted(cut):
        step = min(QUANTUM.get(module, round_to), full[module] - widths[layer][module])
        if _price(shape, module) * step <= room:
            widths[layer][module] += step
            room -= _price(shape, module) * step
    return replace(form_of(shape, widths), native=form.native)


def largest_share(
    shape: ModelShape, form: Callable[[float], ModelForm], *, keep_fraction: float
) -> ModelForm:
    """Return the largest of a family of forms, growing with a share in [0, 1], in the budget."""
    budget = _budget(shape, keep_fraction)
    smallest = model_parameters(shape, form(0.0))
    if smallest > budget:
        _refuse(smallest / dense_parameters(shape), keep_fraction)
    low, high = 0.0, 1.0
    if model_parameters(shape, form(high)) <= budget:
        return form(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if model_parameters(shape, form(middle)) <= budget:
            low = middle
        else:
            high = middle
    return form(low)


def _budget(shape: ModelShape, keep_fraction: float) -> int:
    """Return the most parameters that may stay; a fraction written as a float may be a hair off."""
    return math.floor(keep_fraction * dense_parameters(shape) + 1e-6)


def _refuse(smallest: float, keep_fraction: float) -> None:
    raise PlanError(
        f"keep_fraction {keep_fraction} cannot be met: the smallest result of this method "
        f"keeps {smallest:.4f} of the parameters",
        hint=f"use --keep-fraction {smallest + 5e-5:.4f} or more",
    )


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
