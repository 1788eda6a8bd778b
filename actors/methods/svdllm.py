"""SVD-LLM (arXiv:2403.07378): factor each linear in two, truncated where its outputs are small.

The best rank-r matrix for ``|x W - x W'|_F`` over the calibration tokens is the truncated SVD of
``S W`` with ``S^T S`` the gram of x. Where the output is the narrower side the same matrix is
``W U_r U_r^T`` with U_r the principal axes of the outputs, whose gram is ``W^T C W``: no Cholesky
and no inverse. Where the input is narrower, the whitened input side is decomposed instead. So the
largest eigendecomposition has the model's width, never the FFN's. ``allocation=by_type`` allocates
parameters to layers as SVD-LLM v2 (arXiv:2503.12340) does; see `planners.budget.ranks`.

Rows are tokens in the formulas; weights are in torch's (out, in) orientation in the code.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from actors.methods import _linears
from actors.numerics.low_rank import Axes, output_axes, truncated
from planners.budget.budgets import budget_of
from planners.budget.candidates import shares
from planners.budget.ranks import by_type, one_share, rank_ladder, uniform
from planners.budget.steps import MULTIPLE_OF, TENSOR_PARALLEL, rank_step, refuses_division
from planners.method import Allocation, Ladder, MethodSpec, Option, OptionSpec, Target
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.layer import ROLES
from planners.model.modules import LINEARS_OF
from planners.model.shape import ModelShape
from planners.model.taps import INPUT_OF
from planners.refit import OPTION as REFIT


class SVDLLM:
    """The tensor functions of the method; no state."""

    def compress(  # noqa: PLR0913 as of all methods
        self,
        weights: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        *,
        shape: ModelShape,
        form: LayerForm,
        options: Mapping[str, Option],
        factored: dict[str, Axes] | None = None,
        carried: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the tensors of one layer with the ranks of ``form``, and the error of each linear.

        Args:
            weights: role -> dense tensor.
            sums: statistic name -> sum.
            shape: of the model.
            form: ranks to reach.
            options: of the method.
            factored: cache of axes that serve all ranks, shared between calls.
            carried: unused: inputs stay as they are.

        Raises:
            NumericsError: a gram is not finite, or not positive semi-definite.
        """
        del options, carried
        new = dict(weights)
        errors: dict[str, float] = {}
        rungs: dict[str, str] = {}
        for name, rank in form.ranks.items():
            if f"{name}.weight" not in new:
                continue  # an earlier step has factored it
            weight = new.pop(f"{name}.weight")
            known = {} if factored is None else factored
            if name not in known:
                tap = INPUT_OF[name]
                gram = sums[f"{tap}.gram"]
                known[name] = output_axes(weight, gram, where=f"{name}, tap {tap}")
            first, second, errors[name], rungs[name] = truncated(weight, known[name], rank=rank)
            new[f"{name}.first.weight"] = first.to(weight.dtype).contiguous()
            new[f"{name}.second.weight"] = second.to(weight.dtype).contiguous()
            del known, first, second  # freed before the next linear, unless the caller keeps them
            if f"{name}.bias" in new:
                new[f"{name}.second.bias"] = new.pop(f"{name}.bias")
        dense = [role for role in shape.kind(form).roles if role not in form.ranks]
        return new, {"errors": errors, "rungs": rungs, "left_dense": dense}

    def losses(
        self,
        weights: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        *,
        form: LayerForm,
        options: Mapping[str, Option],
    ) -> dict[str, float]:
        """Return linear -> ``|x W - x W'|_F`` over the calibration tokens at the ranks of ``form``.

        The loss of a linear at full rank in ``form`` is 0.

        Raises:
            NumericsError: a gram is not finite, or not positive semi-definite.
        """
        found = {}
        for name in _linears.named(options):
            if f"{name}.weight" not in weights:
                continue  # the layer has none
            weight, tap = weights[f"{name}.weight"], INPUT_OF[name]
            axes = output_axes(weight, sums[f"{tap}.gram"], where=f"{name}, tap {tap}")
            rank = form.ranks.get(name, len(axes.energy))
            found[name] = float(axes.energy[rank:].sum().sqrt())
            del axes  # before those of the next linear are computed
        return found


def _measures(options: Mapping[str, Option]) -> str:
    return "losses" if options["allocation"] == "by_type" else ""


def _form(
    shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
) -> ModelForm:
    # Losses are measured with all linears at the same share.
    ranks = one_share if _measures(options) else uniform
    return ranks(
        shape,
        budget=budget_of(shape, start, target),
        names=_linears.of_model(shape, options),
        step=partial(rank_step, options=options),
        start=start,
    )


def _allocate(
    shape: ModelShape,
    start: Start,
    target: Target,
    options: Mapping[str, Option],
    findings: list[Mapping[str, object]],
) -> Allocation:
    form = by_type(
        shape,
        findings,
        budget=budget_of(shape, start, target),
        names=_linears.of_model(shape, options),
        step=partial(rank_step, options=options),
        start=start,
    )
    return Allocation(form=form)


def _ladders(
    shape: ModelShape, layer: LayerForm, options: Mapping[str, Option]
) -> dict[str, Ladder]:
    named = set(_linears.named(options))
    found = {
        module: rank_ladder(
            shape, layer, module, shares(options), step=partial(rank_step, options=options)
        )
        for module in ("qk", "vo", "mlp")
        if named.issuperset(set(shape.kind(layer).roles) & {*LINEARS_OF[module]})
    }
    return {module: ladder for module, ladder in found.items() if ladder is not None}


def _joins(modules: Sequence[str]) -> dict[str, Option]:
    linears = [name for module in modules for name in LINEARS_OF[module]]
    return {"allocation": "uniform", "modules": ",".join(linears), REFIT.name: False}


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    return _linears.refuses(options) or refuses_division(shape, options)


SPEC = MethodSpec(
    name="svdllm",
    revision=2,
    source="arXiv:2403.07378",
    modules=ROLES,
    residual=False,
    only_shrinks=True,
    options=(
        OptionSpec(
            name="allocation",
            default="uniform",
            choices=("uniform", "by_type"),
            help="the same share of the parameters for every factored linear, or shares among the "
            "layers, per type of linear, by the loss of truncation",
        ),
        OptionSpec(
            name="modules",
            default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            help="linears to compress",
        ),
        MULTIPLE_OF,
        TENSOR_PARALLEL,
        REFIT,
    ),
    statistics=_linears.grams,
    refuses=_refuses,
    form=_form,
    measures=_measures,
    cuts=_linears.named,
    allocate=_allocate,
    ladders=_ladders,
    joins=_joins,
)
METHOD = SVDLLM()
