"""SVD-LLM (arXiv:2403.07378): each linear as two factors, truncated where its outputs are small.

The best rank-r matrix for ``|x W - x W'|_F`` over the calibration tokens is the truncated SVD of
``S W`` with ``S^T S`` the gram of x. Where the output is the narrower side the same matrix is
``W U_r U_r^T`` with U_r the principal axes of the outputs, whose gram is ``W^T C W``: no Cholesky
and no inverse. Where the input is narrower, the whitened input side is decomposed instead. So the
largest eigendecomposition has the model's width, never the FFN's.

Rows are tokens in the formulas; weights are in torch's (out, in) orientation in the code.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from actors.numerics.linalg import BLOCK, cholesky_psd, eigh_descending
from actors.numerics.packed import Symmetric, congruence
from planners.allocation import largest_share
from planners.cost import dense_model_form
from planners.plan import (
    LINEARS,
    LayerForm,
    MethodSpec,
    ModelForm,
    ModelShape,
    Option,
    OptionSpec,
    Statistic,
    Target,
)
from planners.refit import OPTION as REFIT

TAP_OF = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "o_proj": "o_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "mlp_hidden",
}


def low_rank(
    weight: Float[Tensor, "out inner"], gram: Symmetric, *, rank: int, where: str
) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "out rank"], float, str]:
    """Return both factors, ``|x W - x W'|_F / |x W|_F`` on the tokens of the gram, and the rung.

    Args:
        weight: of any dtype; the factors are in float64.
        gram: of the linear's input.
        rank: columns between the factors.
        where: names the layer and linear in errors.

    Raises:
        NumericsError: the gram is not finite, or not positive semi-definite.
    """
    out_dim, in_dim = weight.shape
    if out_dim <= in_dim:
        weight = weight.to(torch.float64)
        spectrum = eigh_descending(congruence(weight, gram), where=where)
        axes = spectrum.vectors[:, :rank]  # (out, rank)
        first, second, rung = axes.T @ weight, axes, spectrum.rung
    else:
        factor, rung = cholesky_psd(gram, ridge=1e-10, where=where)  # x^T x = L L^T
        # Of the whitened weight W L only its gram is formed: the tall side is met in blocks.
        spectrum = eigh_descending(congruence(factor.T, _inner_gram(weight)), where=where)
        axes = spectrum.vectors[:, :rank]  # (in, rank)
        unwhitened = factor @ axes
        second = torch.empty(out_dim, rank, dtype=torch.float64, device=weight.device)
        for rows, into in zip(*(torch.split(t, BLOCK) for t in (weight, second)), strict=True):
            torch.mm(rows.to(torch.float64), unwhitened, out=into)
        first = torch.linalg.solve_triangular(factor.T, axes, upper=True).T
    energy = spectrum.values.clamp_min(0)
    lost = energy[rank:].sum() / energy.sum().clamp_min(1e-300)
    return first, second, float(lost.sqrt()), rung


def _inner_gram(weight: Float[Tensor, "out inner"]) -> Float[Tensor, "inner inner"]:
    """Return ``W^T W`` in float64."""
    inner = weight.shape[1]
    total = torch.zeros(inner, inner, dtype=torch.float64, device=weight.device)
    for rows in torch.split(weight, BLOCK):
        rows = rows.to(torch.float64)
        total.addmm_(rows.T, rows)
    return total


class SVDLLM:
    """The tensor functions of the method; no state."""

    def compress(
        self,
        weights: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        *,
        shape: ModelShape,
        form: LayerForm,
        options: Mapping[str, Option],
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the tensors of one layer with the ranks of ``form``, and the error of each linear.

        Raises:
            NumericsError: a gram is not finite, or not positive semi-definite.
        """
        del shape, options
        new = dict(weights)
        errors: dict[str, float] = {}
        rungs: dict[str, str] = {}
        for name, rank in form.ranks.items():
            weight = new.pop(f"{name}.weight")
            gram = sums[f"{TAP_OF[name]}.gram"]
            first, second, errors[name], rungs[name] = low_rank(
                weight, gram, rank=rank, where=f"{name}, tap {TAP_OF[name]}"
            )
            new[f"{name}.first.weight"] = first.to(weight.dtype).contiguous()
            new[f"{name}.second.weight"] = second.to(weight.dtype).contiguous()
            if f"{name}.bias" in new:
                new[f"{name}.second.bias"] = new.pop(f"{name}.bias")
        dense = [name for name in LINEARS if name not in form.ranks]
        return new, {"errors": errors, "rungs": rungs, "left_dense": dense}


def _statistics(options: Mapping[str, Option]) -> frozenset[Statistic]:
    del options
    return frozenset(Statistic(tap, "gram") for tap in TAP_OF.values())


def _form(shape: ModelShape, target: Target, options: Mapping[str, Option]) -> ModelForm:
    """Return one share of the parameters for every linear; a rank that saves nothing is none."""
    del options
    dense = dense_model_form(shape)

    def form(share: float) -> ModelForm:
        if share >= 1:
            return replace(dense, native=False)  # a matrix of full rank saves nothing
        ranks = {}
        for name in LINEARS:
            out_dim, in_dim = shape.linear_dims(name)
            rank = max(1, int(share * out_dim * in_dim / (out_dim + in_dim)))
            if rank * (out_dim + in_dim) < out_dim * in_dim:
                ranks[name] = rank
        layer = replace(dense.layers[0], ranks=ranks)
        return replace(dense, layers=(layer,) * shape.num_layers, native=False)

    return largest_share(shape, form, keep_fraction=target.keep_fraction or 1.0)


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    del shape, options
    return ""


SPEC = MethodSpec(
    name="svdllm",
    revision=1,
    source="arXiv:2403.07378",
    modules=LINEARS,
    residual=False,
    options=(
        OptionSpec(
            name="allocation",
            default="uniform",
            choices=("uniform",),
            help="one share of the parameters for every linear",
        ),
        REFIT,
    ),
    statistics=_statistics,
    refuses=_refuses,
    form=_form,
)
METHOD = SVDLLM()
