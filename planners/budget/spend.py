"""Greedy allocation: take the cuts of a path in order until the budget is met."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from planners.errors import PlanError
from planners.method import Ladder
from planners.model.cost import layer_parameters, model_parameters
from planners.model.form import LayerForm, Start
from planners.model.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The size to which a module is cut, and the method that cuts it.

    Attributes:
        ladder: of the method on this module.
        size: one of the ladder's sizes.
        method: empty for a single method.
    """

    ladder: Ladder
    size: int
    method: str = ""


Chosen = Mapping[str, Choice]  # module -> its cut; modules that are not cut are left out
Loss = Callable[[int, str, Choice], float]  # (layer, module, choice) -> estimated damage


def cut_to(layer: LayerForm, chosen: Chosen) -> LayerForm:
    """Return a layer with these of its modules cut."""
    for choice in chosen.values():
        layer = choice.ladder.cut(layer, choice.size)
    return layer


def shrunk(start: Start, chosen: Sequence[Chosen]) -> Iterator[LayerForm]:
    """Yield every layer with its chosen cuts."""
    yield from map(cut_to, start.form.layers, chosen)


def spend_budget(
    shape: ModelShape,
    chosen: Sequence[Chosen],
    path: Sequence[tuple[int, str, Choice]],
    *,
    keep_fraction: float,
    start: Start,
    loss: Loss | None = None,
) -> list[dict[str, Choice]]:
    """Return the largest model within the budget on a path of cuts (layer, module, choice).

    Cuts are taken in whole steps, and only until the budget is met. Between the levels of two
    methods there are no steps: if the budget is met there, the module is cut further by one or
    less far by the other, whichever has the smaller estimated damage.

    Args:
        shape: of the model.
        chosen: of each layer, the cuts made before the first step.
        path: the cuts in order.
        keep_fraction: target, whole model.
        start: the model that is cut.
        loss: the estimated damage, where a path changes from one method to another.

    Raises:
        PlanError: the end of the path is over the budget; the message says how small it can get.
    """
    budget = most_parameters(start, keep_fraction)
    found = [dict(layer) for layer in chosen]
    sizes = [layer_parameters(shape, form) for form in shrunk(start, found)]
    # The tensors outside the layers are unchanged.
    whole = sum(layer_parameters(shape, form) for form in start.form.layers)
    count = model_parameters(shape, start.form) - whole + sum(sizes)

    def parameters(layer: int, module: str, choice: Choice) -> int:
        cut = cut_to(start.form.layers[layer], found[layer] | {module: choice})
        return layer_parameters(shape, cut)

    for layer, module, goal in path:
        if count <= budget:
            break
        room = budget - (count - sizes[layer])

        def fits(choice: Choice, at: tuple[int, str] = (layer, module), room: int = room) -> bool:
            return parameters(*at, choice) <= room

        ends = _ends(found[layer].get(module), goal, fits)
        if loss is not None and len(ends) > 1:
            ends.sort(key=partial(loss, layer, module))
        found[layer][module] = ends[0]
        rest = count - sizes[layer]
        sizes[layer] = parameters(layer, module, ends[0])
        count = rest + sizes[layer]
    if count > budget:
        refuse_budget(count / start.parameters_before, keep_fraction)
    return found


def _ends(now: Choice | None, goal: Choice, fits: Callable[[Choice], bool]) -> list[Choice]:
    """Return where a cut may end: with the goal's method, or further with the current one."""
    ends = [_as_far_as_needed(now, goal, fits)]
    if now is not None and now.method != goal.method and fits(ends[0]):
        last = replace(now, size=now.ladder.levels[-1])
        if last.size < now.size:
            further = _as_far_as_needed(now, last, fits)
            ends += [further] if fits(further) else []
    return ends


def _as_far_as_needed(now: Choice | None, goal: Choice, fits: Callable[[Choice], bool]) -> Choice:
    """Return the largest size that fits between the goal and the current size, else the goal."""
    sizes = goal.ladder.sizes
    same = now is not None and now.method == goal.method
    end = bisect_left(sizes, now.size) if same and now is not None else len(sizes)
    steps = sizes[bisect_left(sizes, goal.size) : end]

    # Parameters grow with the size, so those that fit come first.
    over = bisect_left(steps, True, key=lambda size: not fits(replace(goal, size=size)))
    return replace(goal, size=steps[max(0, over - 1)])


def most_parameters(start: Start, keep_fraction: float) -> int:
    """Return the parameter budget; the tolerance is for fractions that a float does not hold."""
    return math.floor(keep_fraction * start.parameters_before + 1e-6)


def refuse_budget(smallest: float, keep_fraction: float) -> None:
    """Refuse a budget with the smallest fraction that can be met.

    Raises:
        PlanError: always.
    """
    raise PlanError(
        f"keep_fraction {keep_fraction} cannot be met: the smallest result of this method "
        f"keeps {smallest:.4f} of the parameters",
        hint=f"use --keep-fraction {smallest + 5e-5:.4f} or more",
    )
