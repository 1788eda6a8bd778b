"""Allocate the ranks of linears that are stored as two factors."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from planners.budget.budgets import Budget
from planners.budget.widths import bracket, largest_share
from planners.errors import NumericsError
from planners.method import Ladder
from planners.model.cost import linear_dims
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.layer import ROLES
from planners.model.modules import LINEARS_OF
from planners.model.shape import ModelShape

LEAST_LOG = 1e-12  # lower bound of log(1 + loss): a loss of 0 has a finite weight
FLOOR = 0.5  # every matrix keeps at least this part of the share that its type keeps

# The largest share of its parameters that a factored linear keeps; above it the linear stays whole,
# because two factors lose the directions beyond half of the rank at once and save next to nothing.
MOST_SHARE = 0.8
# Least loss per parameter at that share first: that is what only attention scores depend on.
CUT_ORDER = ("q_proj", "k_proj", "up_proj", "gate_proj", "down_proj", "o_proj", "v_proj")

Shares = Callable[[int, str], float]  # (layer, linear) -> kept share of its parameters
StepOf = Callable[[tuple[int, int]], int]  # (out, in) -> step of the rank


def one_share(
    shape: ModelShape, *, budget: Budget, names: Sequence[str], step: StepOf, start: Start
) -> ModelForm:
    """Return the form in which all linears of these names keep one share, however close to 1.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    return largest_share(
        lambda share: _form(shape, start, names, lambda *_: share, step=step), budget
    )


def uniform(
    shape: ModelShape, *, budget: Budget, names: Sequence[str], step: StepOf, start: Start
) -> ModelForm:
    """Return the form in which all factored linears of these names keep one share.

    If all could keep more than `MOST_SHARE`, only as many are factored as needed to meet the
    budget, to that share, in the order of `CUT_ORDER` and from the last layer on; the others stay
    whole. One of them gets what is left over, so that less than one step is unused. Below that
    share all are factored, and up to one step of each is unused.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    form = _form(shape, start, names, lambda *_: MOST_SHARE, step=step)
    if budget.allows(form):
        raising = _Raising(shape=shape, budget=budget, step=step)
        return raising.raised(form, start.form, first=lambda _, name: (-CUT_ORDER.index(name),))
    return one_share(shape, budget=budget, names=names, step=step, start=start)


def by_type(
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    *,
    budget: Budget,
    names: Sequence[str],
    step: StepOf,
    start: Start,
) -> ModelForm:
    """Return ranks by truncation loss, type by type: matrices that lose more are cut less.

    SVD-LLM v2 (arXiv:2503.12340): each type of matrix (q_proj of all layers, ...) gives up the
    same share in total; of it layer i gives up in proportion to ``1 / log(loss_i)``. Here it is
    ``log(1 + loss)``, which is positive for any loss and nearly the same for the large losses of
    large models. The share is chosen so that the true budget is met; less than one step is unused.

    The loss is measured at one share for all and does not tell what a matrix loses at its final
    rank. So none keeps less than `FLOOR` of the share of its type, up to a rank; the others of its
    type give up the difference, in the same proportion. Otherwise small budgets would leave
    matrices of small loss next to nothing, which ruins the model.

    If the types could keep more than `MOST_SHARE`, linears stay whole as in `uniform`, of each
    type those that lose the most.

    Args:
        shape: of the model.
        findings: of each layer, ``losses``: linear -> ``|x W - x W'|_F`` over the calibration
            tokens, W' of the rank that `one_share` gives it.
        budget: of the whole model.
        names: linears that are factored.
        step: of their ranks.
        start: the model that is factored.

    Raises:
        NumericsError: a loss is not finite.
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    weights = {
        name: [_weight(layer, name, finding) for layer, finding in enumerate(findings)]
        for name in names
    }

    def form(share: float) -> ModelForm:
        most = 1 - FLOOR * share
        given = {name: filled(each, mean=1 - share, most=most) for name, each in weights.items()}
        shares: Shares = lambda layer, name: 1 - given[name][layer]  # noqa: E731
        return _form(shape, start, names, shares, step=step)

    raising = _Raising(shape=shape, budget=budget, step=step)
    most = form(MOST_SHARE)
    if budget.allows(most):
        return raising.raised(
            most, start.form,
            first=lambda layer, name: (-CUT_ORDER.index(name), weights[name][layer]),
        )  # fmt: skip
    within, over = bracket(form, budget)
    return raising.raised(form(within), form(over))


def filled(weights: Sequence[float], *, mean: float, most: float = 1.0) -> list[float]:
    """Return ``min(most, c w)`` for each weight, c so that their mean is ``mean``.

    ``weights`` are positive, ``mean`` is in [0, ``most``].
    """
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    found = [0.0] * len(weights)
    left = mean * len(weights)
    for position, index in enumerate(order):
        # From the largest weight on: those that c would lift above ``most`` get it, the rest share.
        rest = math.fsum(weights[i] for i in order[position:])
        found[index] = min(most, max(0.0, left * weights[index] / rest))
        left -= found[index]
    return found


def rank_ladder(
    shape: ModelShape,
    layer: LayerForm,
    module: str,
    shares: Sequence[float],
    *,
    step: StepOf = lambda _: 1,
) -> Ladder | None:
    """Return the ladder of a module whose linears are factored, one of them further at each step.

    All keep about one share of their parameters; one that no rank makes smaller stays whole. A size
    is the sum of the ranks; a whole linear counts as the first rank that saves nothing.

    Returns:
        None if no linear of the module can get smaller, or an earlier step has factored one.
    """
    names = tuple(role for role in shape.kind(layer).roles if role in LINEARS_OF[module])
    if any(name in layer.ranks for name in names):
        return None
    dims = tuple(linear_dims(shape, layer, name) for name in names)
    by = max(map(step, dims))  # one step for all, so that sizes are evenly spaced
    rungs, reached = _rungs(dims, by)
    smallest = sum(rungs[0])
    whole = smallest + by * (len(rungs) - 1)
    if smallest == whole:
        return None
    most = {name: _most(*linear_dims(shape, layer, name)) for name in names}

    def cut(other: LayerForm, size: int) -> LayerForm:
        ranks = dict(zip(names, rungs[(size - smallest) // by], strict=True))
        kept = {name: rank for name, rank in ranks.items() if rank <= most[name]}
        both = {**other.ranks, **kept}
        return replace(other, ranks={name: both[name] for name in ROLES if name in both})

    levels = {smallest + by * bisect_right(reached, share) for share in shares}
    return Ladder(
        sizes=range(smallest, whole, by),
        whole=whole,
        levels=tuple(sorted(levels - {whole}, reverse=True)),
        cut=cut,
    )


def _most(out_dim: int, in_dim: int) -> int:
    """Return the largest rank at which both factors together are smaller than the matrix."""
    return (out_dim * in_dim - 1) // (out_dim + in_dim)


@lru_cache(maxsize=256)  # a few distinct shapes, looked up for every layer
def _rungs(
    dims: tuple[tuple[int, int], ...], by: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """Return ranks from one step for each linear to all whole, and the share kept at each next."""
    steps = sorted(
        (min(1.0, rank * (out_dim + in_dim) / (out_dim * in_dim)), index)
        for index, (out_dim, in_dim) in enumerate(dims)
        for rank in range(2 * by, _most(out_dim, in_dim) + by + 1, by)
    )
    ranks = [by] * len(dims)
    rungs = [tuple(ranks)]
    for _, index in steps:
        ranks[index] += by
        rungs.append(tuple(ranks))
    return tuple(rungs), tuple(share for share, _ in steps)


def _form(
    shape: ModelShape, start: Start, names: Sequence[str], shares: Shares, *, step: StepOf
) -> ModelForm:
    layers = []
    for index, layer in enumerate(start.form.layers):
        ranks = dict(layer.ranks)
        for name in names:
            if name not in shape.kind(layer).roles:
                continue
            out_dim, in_dim = linear_dims(shape, layer, name)
            share = shares(index, name)
            by = step((out_dim, in_dim))
            rank = max(by, by * int(share * out_dim * in_dim / (out_dim + in_dim) / by))
            # Factors of full rank save nothing: the matrix stays whole.
            if share < 1 and rank * (out_dim + in_dim) < out_dim * in_dim:
                ranks[name] = rank
        layers.append(replace(layer, ranks=ranks))
    return replace(start.form, layers=tuple(layers), native=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raising:
    """Raises ranks step by step, as far as a budget allows."""

    shape: ModelShape
    budget: Budget
    step: StepOf

    def raised(
        self,
        small: ModelForm,
        large: ModelForm,
        *,
        first: Callable[[int, str], tuple[float, ...]] = lambda *_: (),
    ) -> ModelForm:
        """Return the smaller form with ranks raised towards the larger one.

        Linears (layer, name) with the smallest ``first`` are raised first; of equal ones, those of
        the first layers.
        """
        layers = list(small.layers)
        room = self.budget.limit - self.budget.cost(small)
        order = [(index, name) for index, layer in enumerate(small.layers) for name in layer.ranks]
        for index, name in sorted(order, key=lambda place: first(*place)):
            goal = large.layers[index].ranks.get(name)
            for ranks in self._ranks(layers[index], name, goal):
                wider = replace(layers[index], ranks=ranks)
                more = self.budget.layer(wider) - self.budget.layer(layers[index])
                if more > room:
                    break
                layers[index], room = wider, room - more
        return replace(small, layers=tuple(layers))

    def _ranks(self, layer: LayerForm, name: str, goal: int | None) -> list[dict[str, int]]:
        """Return the ranks of a layer with one linear raised step by step, up to ``goal``."""
        rank = layer.ranks.get(name)
        if rank is None:
            return []
        dims = linear_dims(self.shape, layer, name)
        last, by = _most(*dims) if goal is None else goal, self.step(dims)
        found = [{**layer.ranks, name: each} for each in range(rank + by, last + 1, by)]
        if goal is None:
            found.append({other: each for other, each in layer.ranks.items() if other != name})
        return found


def _weight(layer: int, name: str, finding: Mapping[str, object]) -> float:
    losses = finding["losses"]
    loss = losses.get(name) if isinstance(losses, Mapping) else None
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        raise NumericsError(f"layer {layer}: the loss of {name} is {loss!r}, not a finite number")
    return 1 / max(math.log1p(max(loss, 0.0)), LEAST_LOG)
