"""DeltaLLM (arXiv:2501.18596): write linears as those of an earlier layer plus thin factors.

A linear of layer d is stored as ``c W_s + B A``: W_s the matrix of an earlier layer, stored once, c
a number and B A of low rank. The paper takes c = 1 and the truncated SVD of ``W_d - W_s``. Trained
neighbours are unrelated matrices, so that is worse than B A alone of the same size. Here, unless
options say otherwise, layer d is first made alike by its exact symmetries; c is the least squares
``<W_s, W_d>_C / <W_s, W_s>_C`` with C the Gram matrix of the inputs; and B A is the best for the
outputs on the calibration tokens. With that it equals a low rank of the same size.

A result stores fewer bytes. It is not faster: both W_s and B A are multiplied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from actors.methods import _linears
from actors.methods._alignment import aligned
from actors.methods._neighbours import Neighbours
from actors.numerics.low_rank import Axes, output_axes, truncated
from actors.numerics.packed import Symmetric, unpacked
from planners.budget.budgets import budget_of
from planners.budget.candidates import shares
from planners.budget.sharing import (
    Sources,
    alternating,
    by_hand,
    delta_ladder,
    deltas,
    deltas_by_damage,
    deltas_within,
    require_alike,
    require_deltas,
    sequential,
)
from planners.budget.steps import MULTIPLE_OF, TENSOR_PARALLEL, rank_step, refuses_division
from planners.method import Allocation, Ladder, MethodSpec, Option, OptionSpec, Target
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.layer import ATTENTION, ROLES
from planners.model.modules import LINEARS_OF
from planners.model.shape import ModelShape
from planners.model.taps import INPUT_OF, Statistic

Sums = Mapping[str, Tensor]
BY_BUDGET = -1  # of the option rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What serves all ranks of a linear.

    Attributes:
        axes: of what is left of it beside its source.
        number: of the source.
        share: the size of that rest on the calibration tokens, relative to the linear's.
    """

    axes: Axes
    number: float
    share: float


ALIGNED = "aligned"  # in what serves all ranks: the layer and its sums, beside differences


class DeltaLLM:
    """The tensor functions of the method; no state."""

    def compress(  # noqa: PLR0913 as of all methods
        self,
        weights: Mapping[str, Tensor],
        sums: Sums,
        *,
        shape: ModelShape,
        form: LayerForm,
        options: Mapping[str, Option],
        neighbours: Neighbours,
        factored: dict[str, Any] | None = None,
        carried: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the tensors of one layer as changes of others, and the error of each linear.

        Args:
            weights: role -> dense tensor.
            sums: statistic name -> sum.
            shape: of the model.
            form: sources and ranks.
            options: of the method.
            neighbours: the sources, as they are in the step's input model and in the result.
            factored: cache of what serves all ranks, shared between calls: the `Difference` of
                each linear, and under `ALIGNED` tensors and sums of the layer.
            carried: unused: nothing rounds what is shared.

        Raises:
            NumericsError: a Gram matrix is not finite, or not positive semi-definite.
        """
        del carried
        new = dict(weights)
        errors: dict[str, float] = {}
        rungs: dict[str, str] = {}
        numbers: dict[str, float] = {}
        if not form.links:
            return new, {"errors": errors, "rungs": rungs}
        source = _sources(form, neighbours)
        known = {} if factored is None else factored
        if options["align"]:
            alike = known.get(ALIGNED) or _aligned(new, source, sums, shape=shape, form=form)
            known[ALIGNED] = alike
            new, sums = dict(alike[0]), alike[1]
        for name, link in form.links.items():
            weight, other = new.pop(f"{name}.weight"), source[f"{name}.weight"]
            if name not in known:
                gram = sums[f"{INPUT_OF[name]}.gram"]
                how = {"fitted": link.fitted, "weighted": bool(options["weighted"])}
                known[name] = _difference(weight, other, gram, where=name, **how)
            kept, rank = known[name], form.ranks.get(name, 0)
            changed = weight.to(torch.float64) - kept.number * other.to(torch.float64)
            first, second, lost, rungs[name] = truncated(changed, kept.axes, rank=rank)
            errors[name] = lost * kept.share
            own = {"first.weight": first, "second.weight": second} if rank else {}
            if link.fitted:
                numbers[name] = kept.number
                own["number"] = torch.tensor([kept.number], dtype=torch.float64)
            new |= {f"{name}.{part}": t.to(weight).contiguous() for part, t in own.items()}
            if f"{name}.bias" in new:
                new[f"{name}.source.bias"] = new.pop(f"{name}.bias")
        return new, {"errors": errors, "rungs": rungs, "numbers": numbers}


def _sources(form: LayerForm, neighbours: Neighbours) -> dict[str, Tensor]:
    """Return the tensors of the sources, by their roles; of linears that have none, of the first.

    Those serve to find which heads and units are alike, and are not stored.
    """
    layers = {link.layer: neighbours.weights(link.layer) for link in form.links.values()}
    found = dict(next(iter(layers.values())))
    for name, link in form.links.items():
        own = layers[link.layer]
        found |= {role: tensor for role, tensor in own.items() if role.partition(".")[0] == name}
    return found


def _aligned(
    weights: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    sums: Sums,
    *,
    shape: ModelShape,
    form: LayerForm,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a layer made alike in the blocks that have sources, and its sums."""
    new, moved = aligned(weights, source, sums, shape=shape, form=form)
    heads = any(name in ATTENTION for name in form.links)
    units = any(name not in ATTENTION for name in form.links)

    def is_new(name: str) -> bool:
        part = name.partition(".")[0]
        return heads if part in (*ATTENTION, "q_norm", "k_norm") else units

    weights = {name: (new if is_new(name) else weights)[name] for name in weights}
    behind = {"o_in": heads, "mlp_hidden": units}
    sums = {
        name: (moved if behind.get(name.partition(".")[0], True) else sums)[name]
        for name in sums
        if name in moved
    }
    return dict(weights), sums


def _difference(
    weight: Float[Tensor, "out inner"],
    source: Float[Tensor, "out inner"],
    gram: Symmetric,
    *,
    fitted: bool,
    weighted: bool,
    where: str,
) -> Difference:
    """Return the number of a source, and the axes of what is left of a linear behind it.

    The number is one that the dtype of the weights holds.
    """
    if not weighted:
        gram = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    whole = unpacked(gram)
    own, other = weight.to(torch.float64), source.to(torch.float64)
    seen = other @ whole
    number = 1.0
    if fitted:
        energy = float((seen * other).sum())
        fit = float((seen * own).sum()) / energy if energy else 0.0
        number = float(torch.tensor(fit, dtype=torch.float64).to(weight.dtype))
    changed = own - number * other
    axes = output_axes(changed, gram, where=f"{where}, tap {INPUT_OF[where]}")
    before = float(((own @ whole) * own).sum())
    share = (float(axes.energy.sum()) / max(before, 1e-300)) ** 0.5
    return Difference(axes=axes, number=number, share=share)


def _statistics(shape: ModelShape, options: Mapping[str, Option]) -> frozenset[Statistic]:
    wanted = _linears.grams(shape, options)
    if not _measures(options):
        return wanted
    return wanted | {Statistic("resid_attn", f"probe{options['probe_tokens']}")}


def _measures(options: Mapping[str, Option]) -> str:
    by_damage = options["layout"] == "measured" and not str(options.get("layers", "")).strip()
    return "damage" if by_damage else ""


def _given(options: Mapping[str, Option], key: str) -> list[int]:
    """Return the layers of an option, which is there only if given.

    Raises:
        ValueError: one is not a number.
    """
    return [int(part) for part in str(options.get(key, "")).split(",") if part.strip()]


def _laid_out(shape: ModelShape, options: Mapping[str, Option]) -> Sources:
    if layers := _given(options, "layers"):
        return by_hand(layers, _given(options, "sources"), num_layers=shape.num_layers)
    if options["layout"] == "alternating":
        return alternating(shape.num_layers)
    if options["layout"] == "sequential":
        return sequential(shape.num_layers)
    return dict.fromkeys(range(1, shape.num_layers), 0)  # until damage is measured


def _form(
    shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
) -> ModelForm:
    budget, names = budget_of(shape, start, target), _linears.of_model(shape, options)
    sources, rank, fitted = _laid_out(shape, options), int(options["rank"]), options["c"] == "fit"
    require_alike(shape, start.form, sources)
    if rank == BY_BUDGET:
        if _measures(options):
            require_deltas(_of_layers(shape, start, options), budget=budget, start=start)
        step = partial(rank_step, options=options)
        return deltas_within(shape, start, sources, names, budget=budget, step=step, fitted=fitted)
    form = deltas(shape, start, sources, names, rank=rank, fitted=fitted)
    if not budget.allows(form):
        budget.refuse(budget.cost(form))
    return form


def _allocate(
    shape: ModelShape,
    start: Start,
    target: Target,
    options: Mapping[str, Option],
    findings: list[Mapping[str, object]],
) -> Allocation:
    ladders = _of_layers(shape, start, options)
    budget = budget_of(shape, start, target)
    form, damage = deltas_by_damage(findings, ladders, budget=budget, start=start)
    return Allocation(form=form, damage=damage)


def _of_layers(
    shape: ModelShape, start: Start, options: Mapping[str, Option]
) -> list[Mapping[str, Ladder]]:
    return [_ladders(shape, layer, options) for layer in start.form.layers]


def _ladders(
    shape: ModelShape, layer: LayerForm, options: Mapping[str, Option]
) -> dict[str, Ladder]:
    named, step = set(_linears.named(options)), partial(rank_step, options=options)
    found = {
        module: delta_ladder(
            shape, layer, module, shares(options), step=step, fitted=options["c"] == "fit"
        )
        for module in ("qk", "vo", "mlp")
        if named.issuperset(set(shape.kind(layer).roles) & {*LINEARS_OF[module]})
    }
    return {module: ladder for module, ladder in found.items() if ladder is not None}


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    if unknown := _linears.refuses(options):
        return unknown
    for key in ("layers", "sources"):
        try:
            _given(options, key)
        except ValueError:
            return f"{key} is {options[key]}; it must be numbers of layers, with commas"
    if _given(options, "sources") and not _given(options, "layers"):
        return "sources are given without the layers that need them"
    if int(options["rank"]) != BY_BUDGET and _measures(options):
        return "a rank is given without layers; layout=measured chooses ranks by itself"
    if _measures(options) and len(set(shape.kind_of)) > 1:
        return "its layers are of different kinds: name some with layers=, and their sources"
    if shape.num_layers < 2:  # noqa: PLR2004 one has no other
        return "it has one layer"
    return refuses_division(shape, options)


SPEC = MethodSpec(
    name="deltallm",
    revision=1,
    source="arXiv:2501.18596",
    modules=ROLES,
    residual=False,
    shares=True,
    only_shrinks=True,
    options=(
        OptionSpec(
            name="layout",
            default="measured",
            choices=("measured", "alternating", "sequential"),
            help="which layers become changes of earlier ones: by measured damage; every second "
            "one; or all behind one. The last two, of the paper, leave two at each end whole",
        ),
        OptionSpec(
            name="layers", default="", help="by hand, in place of a layout: layers, such as 3,5"
        ),
        OptionSpec(
            name="sources",
            default="",
            help="a source for each of layers; else the nearest earlier layer that stays whole",
        ),
        OptionSpec(
            name="rank",
            default=-1,
            minimum=-1,
            help="of all changes, for layers by hand or a layout of the paper; 0 shares matrices "
            "as they are; -1: as the size allows",
        ),
        OptionSpec(
            name="c",
            default="fit",
            choices=("fit", "one"),
            help="the number by which a source is multiplied: of least squares, or 1 as published",
        ),
        OptionSpec(
            name="weighted",
            default=True,
            help="changes are the best for the outputs; false: for the weights, as published",
        ),
        OptionSpec(
            name="align",
            default=True,
            help="units, heads and rope pairs are first ordered and turned as in the source",
        ),
        OptionSpec(
            name="modules",
            default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            help="linears to change",
        ),
        MULTIPLE_OF,
        TENSOR_PARALLEL,
        OptionSpec(
            name="grid",
            default="0.9,0.75,0.6,0.45,0.3,0.15",
            help="kept fractions at which damage is measured",
        ),
        OptionSpec(
            name="probe_tokens", default=8192, minimum=1, help="tokens on which damage is measured"
        ),
    ),
    statistics=_statistics,
    refuses=_refuses,
    form=_form,
    measures=_measures,
    cuts=_linears.named,
    allocate=_allocate,
    ladders=_ladders,
)
METHOD = DeltaLLM()
