"""Greedy allocation: take the cuts of a path in order until the budget is met."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from planners.budget.budgets import Budget
from planners.method import Ladder
from planners.model.form import LayerForm, Start
from planners.model.scheme import Scheme


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

    @property
    def key(self) -> tuple[str, Scheme | None]:
        """Method and scheme: only sizes of one ladder can be compared."""
        return self.method, self.ladder.scheme


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
    budget: Budget,
    chosen: Sequence[Chosen],
    path: Sequence[tuple[int, str, Choice]],
    *,
    start: Start,
    loss: Loss | None = None,
) -> list[dict[str, Choice]]:
    """Return the largest model within the budget on a path of cuts (layer, module, choice).

    Cuts are taken in whole steps, and only until the budget is met. Between the levels of two
    methods there are no steps: if the budget is met there, the module is cut further by one or
    less far by the other, whichever has the smaller estimated damage.

    Args:
        budget: what the whole model may cost; a smaller width never costs more.
        chosen: of each layer, the cuts made before the first step.
        path: the cuts in order.
        start: the model that is cut.
        loss: the estimated damage, where a path changes from one method to another.

    Raises:
        PlanError: the end of the path is over the budget; the message says how small it can get.
    """
    found = [dict(layer) for layer in chosen]
    costs = [budget.layer(form) for form in shrunk(start, found)]
    # All but the layers is unchanged.
    count = budget.outside(start.form) + sum(costs)

    def cost(layer: int, module: str, choice: Choice) -> float:
        return budget.layer(cut_to(start.form.layers[layer], found[layer] | {module: choice}))

    for layer, module, goal in path:
        if count <= budget.limit:
            break
        room = budget.limit - (count - costs[layer])

        def fits(choice: Choice, at: tuple[int, str] = (layer, module), room: float = room) -> bool:
            return cost(*at, choice) <= room

        ends = _ends(found[layer].get(module), goal, fits)
        if loss is not None and len(ends) > 1:
            ends.sort(key=partial(loss, layer, module))
        found[layer][module] = ends[0]
        rest = count - costs[layer]
        costs[layer] = cost(layer, module, ends[0])
        count = rest + costs[layer]
    if count > budget.limit:
        budget.refuse(count)
    return found


def _ends(now: Choice | None, goal: Choice, fits: Callable[[Choice], bool]) -> list[Choice]:
    """Return where a cut may end: with the goal's method, or further with the current one."""
    ends = [_as_far_as_needed(now, goal, fits)]
    if now is not None and now.key != goal.key and fits(ends[0]):
        last = replace(now, size=now.ladder.levels[-1])
        if last.size < now.size:
            further = _as_far_as_needed(now, last, fits)
            ends += [further] if fits(further) else []
    return ends


def _as_far_as_needed(now: Choice | None, goal: Choice, fits: Callable[[Choice], bool]) -> Choice:
    """Return the largest size that fits between the goal and the current size, else the goal."""
    sizes = goal.ladder.sizes
    same = now is not None and now.key == goal.key
    end = bisect_left(sizes, now.size) if same and now is not None else len(sizes)
    steps = sizes[bisect_left(sizes, goal.size) : end]

    # Cost grows with the size, so those that fit come first.
    over = bisect_left(steps, True, key=lambda size: not fits(replace(goal, size=size)))
    return replace(goal, size=steps[max(0, over - 1)])
