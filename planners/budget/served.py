"""Widths under the constraints of what is to serve the result.

``native`` and ``narrow_heads`` are models of the input's own class: one FFN width, and heads that
are whole or of one smaller width, with one set of rope pairs for the whole model. ``vllm`` needs
our modelling file for FFN widths by layer, and has such heads, of a width that its kernels take.
``remote`` may have any widths.
Under each the widths are chosen by the same measured damage, so the constraints can be compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from planners.budget.budgets import Budget
from planners.budget.hull import by_measured_damage, cheapest, damage_at, read_curves
from planners.budget.widths import Steps, cut_layer, largest_width, layer_widths, width_ladder
from planners.errors import PlanError
from planners.method import Allocation, Ladder
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.shape import ModelShape
from planners.serving import VLLM_HEAD_DIMS

STOCK = ("native", "narrow_heads")
# A stock model that every engine loads is worth this much more predicted damage.
WORTH = 1.15
# The cut of q and k to rope pairs that all heads of the model keep, beside that of each head's own.
PAIRS = "pairs"
PAIR_SCALES = "pair_scales"  # beside the sums of a layer: what each head multiplies q by there
REAL_SIZE, REAL_STEP = 2048, 128  # a stock FFN of a real model also suits quantised kernels

Curve = Sequence[tuple[int, float]]  # (width, damage), the full width at damage 0 among them


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The widths under one constraint, and the damage that the measured curves predict for them."""

    form: ModelForm
    damage: float


def narrows_heads(shape: ModelShape) -> bool:
    """Return whether a stock config can express a model of this shape with narrower heads."""
    return "heads" in shape.native


def stock_steps(shape: ModelShape, steps: Steps) -> dict[str, int]:
    """Return the steps of the widths of a stock model: coarser at real sizes, unless asked for."""
    coarse = shape.intermediate >= REAL_SIZE and REAL_STEP % steps["mlp"] == 0
    head = max(steps["qk"], steps["vo"])
    return {**steps, "mlp": REAL_STEP if coarse else steps["mlp"], "qk": head, "vo": head}


def head_widths(shape: ModelShape, servable: str, steps: Steps) -> list[int]:
    """Return the head widths that a constraint allows, the full one included."""
    full = shape.head_dim
    narrower = list(range(steps["qk"], full, steps["qk"]))
    if servable == "vllm":  # its engine is told a width by the config
        of_kernels = [width for width in [*narrower, full] if width in VLLM_HEAD_DIMS]
        return of_kernels if narrows_heads(shape) else [w for w in of_kernels if w == full]
    return {"native": [full], "narrow_heads": narrower}[servable]


def with_heads(layer: LayerForm, width: int, *, pairs: Sequence[int] = ()) -> LayerForm:
    """Return a layer with q, k, v and o heads of one width; of these rope pairs where given."""
    cut = cut_layer(layer, layer_widths(layer) | {"qk": width, "vo": width})
    if not pairs:
        return cut
    # A stock config says which linears have a bias: that of v stays where it is.
    return replace(cut, pairs=tuple(sorted(pairs)), biases=layer.biases)


def served(
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    constraints: Sequence[str],
    *,
    budget: Budget,
    steps: Steps,
    start: Start,
) -> Allocation:
    """Return the widths under the first constraint, or under a stock one that costs little more.

    Where the first is ``remote``, the best of the others takes its place if its predicted damage is
    at most `WORTH` times as large.

    Args:
        shape: of the model.
        findings: of each layer, as measured.
        constraints: ``remote``, ``native``, ``narrow_heads`` or ``vllm``.
        budget: of the whole model.
        steps: of the widths.
        start: the model that is cut.

    Raises:
        PlanError: no widths are within the budget under the first constraint.
    """
    found: dict[str, Found] = {}
    for constraint in constraints:
        try:
            found[constraint] = best(
                shape, findings, constraint, budget=budget, steps=steps, start=start
            )
        except PlanError:
            if not found:  # others may lack what the first can do
                raise
    first = constraints[0]
    rest = [name for name in found if name != first]
    other = min(rest, key=lambda name: found[name].damage, default=first)
    chosen = other if found[other].damage <= WORTH * found[first].damage else first
    damages = {name: each.damage for name, each in found.items()}
    return Allocation(form=found[chosen].form, servable=chosen, damages=damages)


def best(
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    servable: str,
    *,
    budget: Budget,
    steps: Steps,
    start: Start,
) -> Found:
    """Return the widths with the least predicted damage under a constraint.

    Args:
        shape: of the model.
        findings: of each layer, ``curves`` as measured, and ``pair_scores`` for narrower heads that
            share their rope pairs.
        servable: the constraint.
        budget: of the whole model.
        steps: of the widths.
        start: the model that is cut.

    Raises:
        PlanError: no widths are within the budget.
    """
    curves = [read_curves(finding["curves"]) for finding in findings]
    if servable == "remote":
        form = by_measured_damage(shape, findings, budget=budget, steps=steps, start=start)
        return Found(form=form, damage=predicted(start.form, form, curves))
    order = pair_order(findings) if servable != "native" else []
    steps = stock_steps(shape, steps) if servable in STOCK else steps
    found, smallest = [], []
    for width in head_widths(shape, servable, steps):
        if width < shape.head_dim and not _measured(curves, width):
            continue
        pairs = order[: width // 2] if width < shape.head_dim else []
        layers = [with_heads(layer, width, pairs=pairs) for layer in start.form.layers]
        narrowed = replace(start.form, layers=tuple(layers))
        ladders = list(_ladders(narrowed, curves, steps))
        least = _at(narrowed, [ladder.levels[-1:] for ladder in ladders], ladders)
        smallest.append(budget.cost(least))
        if not budget.allows(least):
            continue
        if servable in STOCK:
            form = _uniform(narrowed, ladders[0], budget)
        else:
            form = _by_layer(narrowed, curves, ladders, budget=budget, start=start)
        damage = predicted(start.form, form, curves)
        found.append(Found(form=replace(form, native=servable in STOCK), damage=damage))
    if not smallest:
        raise PlanError(
            f"servable={servable}: no head width below {shape.head_dim} is a multiple of "
            f"{steps['qk']} whose damage was measured",
            hint="use servable=native or remote, or a smaller --multiple-of",
        )
    if not found:
        budget.refuse(min(smallest))
    # Of equal ones the widest heads.
    return min(reversed(found), key=lambda each: each.damage)


def predicted(start: ModelForm, form: ModelForm, curves: Sequence[Mapping[str, Curve]]) -> float:
    """Return the sum of the damages of all cuts, read off straight lines between the levels."""
    total = 0.0
    for before, layer, known in zip(start.layers, form.layers, curves, strict=True):
        full, widths = layer_widths(before), layer_widths(layer)
        for module, width in widths.items():
            name = PAIRS if module == "qk" and layer.pairs else module
            if width < full[module]:
                total += damage_at(known[name], width)
    return total


def pair_order(findings: Sequence[Mapping[str, object]]) -> list[int]:
    """Return the rope pairs of a head, the most important of the whole model first.

    Of each layer ``pair_scores`` are the shares that pairs have in the scores of its heads.
    """
    scored = [finding["pair_scores"] for finding in findings if finding.get("pair_scores")]
    assert all(isinstance(scores, list) for scores in scored)  # of our own records
    totals = [sum(scores) for scores in zip(*scored, strict=True)]
    return sorted(range(len(totals)), key=lambda pair: -totals[pair])


def _measured(curves: Sequence[Mapping[str, Curve]], width: int) -> bool:
    """Return whether the damage of heads of a width lies within what was measured."""
    modules = (PAIRS, "vo")
    points = [min(size for size, _ in known[m]) for known in curves for m in modules if m in known]
    return width >= max(points, default=0)


def _ladders(
    form: ModelForm, curves: Sequence[Mapping[str, Curve]], steps: Steps
) -> Iterator[Ladder]:
    for layer, known in zip(form.layers, curves, strict=True):
        ladder = width_ladder(layer.intermediate, "mlp", (), step=steps["mlp"])
        least = min((size for size, _ in known.get("mlp", ())), default=layer.intermediate)
        sizes = range(-(-least // steps["mlp"]) * steps["mlp"], layer.intermediate, steps["mlp"])
        yield replace(ladder, sizes=sizes, levels=tuple(sizes[:1]))


def _at(form: ModelForm, sizes: Sequence[Sequence[int]], ladders: Sequence[Ladder]) -> ModelForm:
    cut = [
        ladder.cut(layer, size[0]) if size else layer
        for layer, size, ladder in zip(form.layers, sizes, ladders, strict=True)
    ]
    return replace(form, layers=tuple(cut))


def _uniform(form: ModelForm, ladder: Ladder, budget: Budget) -> ModelForm:
    """Return the model with the largest FFN width that is the same in all layers."""

    def cut(width: int) -> ModelForm:
        if width == ladder.whole:
            return form
        return replace(form, layers=tuple(ladder.cut(layer, width) for layer in form.layers))

    return cut(largest_width([*ladder.sizes, ladder.whole], cut, budget=budget))


def _by_layer(
    form: ModelForm,
    curves: Sequence[Mapping[str, Curve]],
    ladders: Sequence[Ladder],
    *,
    budget: Budget,
    start: Start,
) -> ModelForm:
    return cheapest(
        [{"": {"mlp": known["mlp"]} if "mlp" in known else {}} for known in curves],
        [
            {"": {"mlp": ladder} if "mlp" in known else {}}
            for ladder, known in zip(ladders, curves, strict=True)
        ],
        budget=budget,
        start=replace(start, form=form),
    ).form
