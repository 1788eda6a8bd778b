"""Basis Sharing (arXiv:2410.03765), Tucker and CP: store factors once for groups of layers.

The linears of one role in a group of neighbouring layers are factored together:

- ``basis``: ``W_l = B_l A``, a basis A of inputs for all, coefficients B_l of each layer. That is
  the truncated SVD of the matrices below each other, whitened by the sum of the layers' Gram
  matrices. The paper leaves o and down out, whose inputs differ most; these get factors of their
  own, as in SVD-LLM.
- ``tucker``: ``W_l = U G_l A``, bases of inputs and of outputs for all, a core of each layer.
- ``cp``: ``W_l = U diag(s_l) A``, components for all, a number of each layer for each.

The first layer of a group stores what is shared. Every layer's own part is the best one for its own
inputs and for the shared factors as they are stored.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from actors.methods import _linears
from actors.methods._neighbours import Neighbours
from actors.numerics import stacks
from planners.budget.budgets import budget_of
from planners.budget.sharing import (
    SizesOf,
    basis_sizes,
    cp_sizes,
    shared_within,
    tucker_sizes,
)
from planners.budget.steps import MULTIPLE_OF, TENSOR_PARALLEL, rank_step, refuses_division
from planners.method import MethodSpec, Option, OptionSpec, Target
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.layer import ROLES
from planners.model.shape import ModelShape
from planners.model.taps import INPUT_OF

Tensors = Mapping[str, Tensor]
ALONE = ("o_proj", "down_proj")  # without a shared basis, as in the paper


class BasisSharing:
    """The tensor functions of the method; no state."""

    def compress(  # noqa: PLR0913 as of all methods
        self,
        weights: Tensors,
        sums: Tensors,
        *,
        shape: ModelShape,
        form: LayerForm,
        options: Mapping[str, Option],
        neighbours: Neighbours,
        factored: dict[str, object] | None = None,
        carried: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return what one layer stores: its own factors, and those that others take from it.

        Args:
            weights: role -> dense tensor.
            sums: statistic name -> sum.
            shape: of the model.
            form: ranks, cores and links.
            options: of the method.
            neighbours: the layers of its group.
            factored: unused: one size is computed.
            carried: unused: nothing rounds what is shared.

        Raises:
            NumericsError: a Gram matrix is not finite, or not positive semi-definite.
        """
        del options, factored, carried
        new = dict(weights)
        errors: dict[str, float] = {}
        owners = {link.layer: neighbours.stored(link.layer) for link in form.links.values()}
        group = _Group(weights, sums, neighbours)
        for name, rank in form.ranks.items():
            weight = new.pop(f"{name}.weight")
            gram = sums[f"{INPUT_OF[name]}.gram"]
            link, rows = form.links.get(name), form.cores.get(name)
            if link is None:
                shared = group.factors(name, rank, rows)
            else:
                taken = owners[link.layer]
                shared = {part: taken[f"{name}.{part}.weight"] for part in link.parts}
            shared = {part: factor.to(weight.dtype) for part, factor in shared.items()}
            own = _own_part(weight, shared, gram, rows=rows, where=f"{name}, tap {INPUT_OF[name]}")
            own = {part: factor.to(weight.dtype) for part, factor in own.items()}
            stored = own if link is not None else {**shared, **own}
            for part, factor in stored.items():
                below = part if part == "diagonal" else f"{part}.weight"
                new[f"{name}.{below}"] = factor.contiguous()
            if f"{name}.bias" in new:
                new[f"{name}.second.bias"] = new.pop(f"{name}.bias")
            errors[name] = stacks.relative_error(weight, _product({**shared, **own}), gram)
        dense = [role for role in shape.kind(form).roles if role not in form.ranks]
        return new, {"errors": errors, "rungs": {}, "left_dense": dense}


class _Group:
    """One layer and those that take factors from it."""

    def __init__(self, weights: Tensors, sums: Tensors, neighbours: Neighbours) -> None:
        self._own = weights, sums
        self._takers = [
            (form, neighbours.weights(layer), neighbours.sums(layer))
            for layer, form in neighbours.takers.items()
        ]

    def factors(self, name: str, rank: int, rows: int | None) -> dict[str, Tensor]:
        """Return the factors of a linear that the layers share, by the parts that they are."""
        where, tap = f"{name}, tap {INPUT_OF[name]}", f"{INPUT_OF[name]}.gram"
        members = [self._own]
        members += [(weights, sums) for form, weights, sums in self._takers if name in form.links]
        gram = torch.stack([sums[tap].to(torch.float64) for _, sums in members]).sum(0)
        weights = [each[f"{name}.weight"] for each, _ in members]
        stack = stacks.whitened(weights, gram, where=where)
        if rows is None:
            return {"first": stacks.shared_basis(stack, rank=rank, where=where).first}
        if rows:
            tucker = stacks.tucker(stack, rank_in=rank, rank_out=rows, where=where)
            return {"first": tucker.first, "second": tucker.second}
        cp = stacks.cp(stack, rank=rank, where=where)
        return {"first": cp.first, "second": cp.second}


def _own_part(
    weight: Tensor, shared: Tensors, gram: Tensor, *, rows: int | None, where: str
) -> dict[str, Tensor]:
    """Return the best part of a layer's own to shared factors as they are stored."""
    first = shared["first"]
    if rows is None:
        return {"second": stacks.coefficients(weight, first, gram, where=where)}
    if rows:
        return {"core": stacks.core(weight, first, shared["second"], gram, where=where)}
    return {"diagonal": stacks.scales(weight, first, shared["second"], gram, where=where)}


def _product(parts: Tensors) -> Tensor:
    first = parts["first"].to(torch.float64)
    if "core" in parts:
        first = parts["core"].to(torch.float64) @ first
    if "diagonal" in parts:
        first = parts["diagonal"].to(torch.float64)[:, None] * first
    return parts["second"].to(torch.float64) @ first


def _sizes(shape: ModelShape, options: Mapping[str, Option]) -> dict[str, SizesOf]:
    """Return how the factors of each linear are sized."""
    sizes_of = {"basis": basis_sizes, "tucker": tucker_sizes, "cp": cp_sizes}[str(options["form"])]
    return dict.fromkeys(_linears.of_model(shape, options), sizes_of)


def _form(
    shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
) -> ModelForm:
    return shared_within(
        shape,
        start,
        _sizes(shape, options),
        alone=ALONE if options["form"] == "basis" else (),
        group=int(options["group"]),
        budget=budget_of(shape, start, target),
        step=partial(rank_step, options=options),
    )


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    return _linears.refuses(options) or refuses_division(shape, options)


SPEC = MethodSpec(
    name="basis_sharing",
    revision=1,
    source="arXiv:2410.03765",
    modules=ROLES,
    residual=False,
    shares=True,
    only_shrinks=True,
    options=(
        OptionSpec(
            name="form",
            default="basis",
            choices=("basis", "tucker", "cp"),
            help="what neighbouring layers share: a basis of inputs; also one of outputs (tucker); "
            "or all but a number for each component (cp)",
        ),
        OptionSpec(name="group", default=2, minimum=1, help="neighbouring layers that share"),
        OptionSpec(
            name="modules",
            default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            help="linears to factor; with form=basis, o and down have factors of their own",
        ),
        MULTIPLE_OF,
        TENSOR_PARALLEL,
    ),
    statistics=_linears.grams,
    refuses=_refuses,
    form=_form,
    cuts=_linears.named,
)
METHOD = BasisSharing()
