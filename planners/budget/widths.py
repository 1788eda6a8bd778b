"""Allocate the inner widths of modules: uniform shares, or by the influence of layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from planners.budget.budgets import Budget
from planners.budget.spend import Choice, shrunk, spend_budget
from planners.errors import NumericsError
from planners.method import Ladder
from planners.model.cost import dense_start
from planners.model.form import LayerForm, ModelForm, Start, with_biases
from planners.model.shape import ModelShape

BISECTIONS = 60  # of a share in [0, 1]: finer than any width
LOG_NOTHING = 40.0  # e^-40 of a width is less than rounding


def largest_width(
    widths: Sequence[int], form: Callable[[int], ModelForm], *, budget: Budget
) -> int:
    """Return the largest of ``widths`` within the budget.

    Args:
        widths: candidates, ascending.
        form: width -> the model, whose cost must not decrease with the width.
        budget: what it may cost.

    Raises:
        PlanError: even the narrowest candidate is over the budget; the message says how small it
            can get.
    """
    low, high = 0, len(widths)
    while low < high:
        middle = (low + high) // 2
        if budget.allows(form(widths[middle])):
            low = middle + 1
        else:
            high = middle
    if low == 0:
        budget.refuse(budget.cost(form(widths[0])))
    return widths[low - 1]


# The inner widths that a modular method may cut; `planners.budget.steps` has the step of each.
FIELD = {"mlp": "intermediate", "qk": "qk_head_dim", "vo": "vo_head_dim"}
Widths = dict[str, int]
Steps = Mapping[str, int]  # module -> step of its width


def layer_widths(layer: LayerForm) -> Widths:
    """Return module -> inner width of a layer."""
    return {module: getattr(layer, field) for module, field in FIELD.items()}


def cut_layer(layer: LayerForm, widths: Mapping[str, int]) -> LayerForm:
    """Return a layer with these inner widths; cutting v moves its bias into that of o."""
    cut = replace(
        layer,
        intermediate=widths["mlp"],
        qk_head_dim=widths["qk"],
        vo_head_dim=widths["vo"],
    )
    if "v_proj" in layer.biases and widths["vo"] < layer.vo_head_dim:
        return with_biases(cut, {*layer.biases, "o_proj"} - {"v_proj"})
    return cut


def form_of(
    shape: ModelShape, widths: Sequence[Mapping[str, int]], start: Start | None = None
) -> ModelForm:
    """Return the model whose layers have these inner widths.

    Args:
        shape: of the model.
        widths: of each layer, module -> inner width.
        start: the model that is cut; the uncompressed one if None.
    """
    form = (start or dense_start(shape)).form
    layers = (cut_layer(*pair) for pair in zip(form.layers, widths, strict=False))
    return replace(form, layers=tuple(layers), native=False)


def rounded(full: int, width: float, *, step: int) -> int:
    """Return the nearest multiple of a step, at least one step and at most ``full``."""
    if width >= full:
        return full
    return min(full, max(step, step * math.floor(width / step + 0.5)))


def uniform(
    shape: ModelShape,
    *,
    budget: Budget,
    modules: Sequence[str],
    steps: Steps,
    alike: bool = False,
    start: Start | None = None,
) -> ModelForm:
    """Return the largest model within the budget whose layers all keep one share of each width.

    If all would take the next step at the same share, only as many take it as needed to meet the
    budget, unless all layers must be ``alike``.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    start = start or dense_start(shape)
    whole = [layer_widths(layer) for layer in start.form.layers]

    def form(share: float) -> ModelForm:
        cut = [
            full | {m: rounded(full[m], share * full[m], step=steps[m]) for m in modules}
            for full in whole
        ]
        return form_of(shape, cut, start)

    if alike:
        return largest_share(form, budget)
    return _between(form, budget=budget, steps=steps, start=start)


def by_influence(  # noqa: PLR0913 the formula has as many inputs
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    *,
    budget: Budget,
    modules: Sequence[str],
    steps: Steps,
    temperature: float,
    start: Start | None = None,
) -> ModelForm:
    """Return widths by Block Influence: layer i loses ``c * softmax(-s_i / temperature)``.

    MoDeGPT eq. 10-11 (arXiv:2408.09632); c is chosen so that the true budget is met. If several
    widths would take the next step at the same c, only as many take it as the budget needs.

    Args:
        shape: of the model.
        findings: of each layer, ``influence``: 1 - mean cosine between its input and output.
        budget: of the whole model.
        modules: that are cut.
        steps: of their widths.
        temperature: of the softmax; influence is between 0 and 2.
        start: the model that is cut; the uncompressed one if None.

    Raises:
        NumericsError: an influence is not finite.
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    scores = [_influence(i, finding["influence"]) for i, finding in enumerate(findings)]
    least, most = min(scores), max(scores)
    start = start or dense_start(shape)
    whole = [layer_widths(layer) for layer in start.form.layers]
    # c on a logarithmic scale, from removing nothing to removing all of every width.
    span = (most - least) / temperature + LOG_NOTHING

    def form(share: float) -> ModelForm:
        removed = [
            math.exp(min(0.0, (1 - share) * span - LOG_NOTHING - (score - least) / temperature))
            for score in scores
        ]
        cut = [
            full | {m: rounded(full[m], (1 - r) * full[m], step=steps[m]) for m in modules}
            for r, full in zip(removed, whole, strict=True)
        ]
        return form_of(shape, cut, start)

    return _between(form, budget=budget, steps=steps, start=start)


def levels(full: int, shares: Sequence[float], *, step: int) -> list[int]:
    """Return the widths at which the damage of a module is measured, descending, each once."""
    found = {rounded(full, share * full, step=step) for share in shares}
    return sorted(found - {full}, reverse=True)


def width_ladder(full: int, module: str, shares: Sequence[float], *, step: int) -> Ladder:
    """Return the ladder of the inner width of a module."""

    def cut(layer: LayerForm, width: int) -> LayerForm:
        return cut_layer(layer, layer_widths(layer) | {module: width})

    return Ladder(
        sizes=range(step, full, step),
        whole=full,
        levels=tuple(levels(full, shares, step=step)),
        cut=cut,
    )


def _between(
    form: Callable[[float], ModelForm], *, budget: Budget, steps: Steps, start: Start
) -> ModelForm:
    """Return the largest model between the last form within the budget and the next one over it.

    The widths that differ between the two are cut one by one, the last layer first, until the
    budget is met.
    """
    within, over = bracket(form, budget)
    small, large = (
        [layer_widths(layer) for layer in form(share).layers] for share in (within, over)
    )
    chosen: list[dict[str, Choice]] = []
    path: list[tuple[int, str, Choice]] = []
    for layer, form_before in reversed(list(enumerate(start.form.layers))):
        ladders = {
            module: width_ladder(full, module, (), step=steps[module])
            for module, full in layer_widths(form_before).items()
        }
        chosen.insert(0, {
            module: Choice(ladder=ladders[module], size=width)
            for module, width in large[layer].items()
            if width < layer_widths(form_before)[module]
        })  # fmt: skip
        path += [
            (layer, module, Choice(ladder=ladders[module], size=width))
            for module, width in small[layer].items()
            if width < large[layer][module]
        ]
    found = spend_budget(budget, chosen, path, start=start)
    return replace(start.form, layers=tuple(shrunk(start, found)), native=False)


def largest_share(form: Callable[[float], ModelForm], budget: Budget) -> ModelForm:
    """Return the form of the largest share in [0, 1] that is within the budget."""
    return form(bracket(form, budget)[0])


def bracket(form: Callable[[float], ModelForm], budget: Budget) -> tuple[float, float]:
    """Return a share within the budget and the next one over it; both 1.0 if all are within."""
    if not budget.allows(form(0.0)):
        budget.refuse(budget.cost(form(0.0)))
    low, high = 0.0, 1.0
    if budget.allows(form(high)):
        return high, high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if budget.allows(form(middle)):
            low = middle
        else:
            high = middle
    return low, high


def _influence(layer: int, value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise NumericsError(f"layer {layer}: its influence is {value!r}, not a finite number")
    return float(value)
