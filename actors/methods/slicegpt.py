"""SliceGPT (arXiv:2401.15024): rotate the residual stream to its principal axes, drop small ones.

``RMSNorm(x Q) Q^T = RMSNorm(x)`` for orthogonal Q once the norm's scale is folded into the next
weights, so every site of the residual stream may have its own basis, at the price of one
*shortcut* matrix ``Q_a^T Q_b`` between sites. All bases come from the dense model's activations,
hence all layers are independent; with ``schedule=sequential`` each comes from the activations after
the sites that are already sliced, as in the published program. ``rotation=shared`` uses one basis
for all sites: no shortcuts, and the result is a narrower stock model.

Rows are tokens in the formulas; weights are in torch's (out, in) orientation in the code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from actors.numerics.linalg import BLOCK, eigh_descending
from actors.numerics.packed import Symmetric, diagonal, unpacked
from planners.budget.budgets import budget_of
from planners.budget.steps import (
    MULTIPLE_OF,
    TENSOR_PARALLEL,
    refuses_division,
    width_steps,
)
from planners.budget.widths import largest_width
from planners.errors import PlanError
from planners.method import MethodSpec, Option, OptionSpec, Target
from planners.model.form import LayerForm, ModelForm, Start, with_biases
from planners.model.layer import LayerKind, Norm
from planners.model.shape import ModelShape
from planners.model.taps import Statistic

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """The kept axes of one site.

    Attributes:
        vectors: shape (hidden, keep_dim), float64, orthonormal columns, largest variance first.
        values: all eigenvalues of the site's gram, float64, descending; shape (0,) for a site that
            was kept at full width without statistics.
        rung: of the damping ladder at which the factorisation succeeded.
    """

    vectors: Float[Tensor, "hidden keep"]
    values: Float[Tensor, " known"]
    rung: str

    @property
    def energy_kept(self) -> float:
        """Share of the gram's trace inside the kept axes, in [0, 1]."""
        if not len(self.values):
            return 1.0
        kept = self.values[: self.vectors.shape[1]].clamp_min(0).sum()
        return float(kept / self.values.clamp_min(0).sum())


def site_basis(gram: Symmetric, *, keep_dim: int, where: str) -> Basis:
    """Return the ``keep_dim`` principal axes of one site.

    Raises:
        NumericsError: the gram is not finite or cannot be decomposed.
    """
    spectrum = eigh_descending(gram, where=where)
    return Basis(
        vectors=spectrum.vectors[:, :keep_dim].contiguous(),
        values=spectrum.values,
        rung=spectrum.rung,
    )


def shared_gram(grams: list[Tensor]) -> Symmetric:
    """Return the sum of the sites' grams, each scaled to trace one.

    Without the scaling the last layers, whose residual stream is largest, would dominate.
    """
    total = torch.zeros_like(grams[0], dtype=torch.float64)
    for gram in grams:
        total.add_(gram / diagonal(gram).sum())
    return total


def centred_gram(gram: Symmetric) -> Float[Tensor, "hidden hidden"]:
    """Return ``M C M`` of a gram C, with M the map that subtracts the mean over the channels."""
    whole = unpacked(gram)
    means = whole.mean(dim=0, keepdim=True)
    return whole - means - means.T + means.mean()


def sliced_layer(
    weights: Weights, *, kind: LayerKind, bases: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of one layer between three bases, shortcuts included.

    Args:
        weights: role -> tensor: ``q_proj.weight`` ... ``attn_norm.weight`` ...; a linear may be
            two factors, and inner widths may be cut.
        kind: of the layer.
        bases: (hidden, keep) each: of the site that attention reads, of the site that the MLP
            reads, and of the next layer's first site. A parallel layer has no site between.
    """
    basis_in, basis_mid, basis_out = bases
    new = _between(weights, kind, bases)
    dtype = _dtype(weights)
    if kind.parallel:
        return new | {"attn_shortcut.weight": (basis_out.T @ basis_in).to(dtype)}
    new["attn_shortcut.weight"] = (basis_mid.T @ basis_in).to(dtype)
    new["mlp_shortcut.weight"] = (basis_out.T @ basis_mid).to(dtype)
    return new


def narrowed_layer(weights: Weights, *, kind: LayerKind, basis: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one layer in a basis that all sites share: a stock layer.

    A stock norm divides by the root mean square over the kept width d', ours over the original
    width D: the factor sqrt(D / d') is folded into the weights that read the norm, and
    eps' = eps D / d'.
    """
    hidden, keep = basis.shape
    new = _between(weights, kind, (basis, basis, basis), gain=math.sqrt(hidden / keep))
    ones = torch.ones(keep, dtype=_dtype(weights), device=basis.device)
    return new | {f"{norm.role}.weight": ones.clone() for norm in _block_norms(kind)}


def _block_norms(kind: LayerKind) -> list[Norm]:
    return [norm for norm in kind.norms if norm.over != "head"]


def _dtype(weights: Weights) -> torch.dtype:
    return weights[f"{_part(weights, 'o_proj', 'second')}.weight"].dtype


def _between(
    weights: Weights,
    kind: LayerKind,
    bases: tuple[Tensor, Tensor, Tensor],
    *,
    gain: float = 1.0,
) -> dict[str, Tensor]:
    """Return all tensors but the norms, with inputs and outputs rotated and cut, in their dtypes.

    In a linear of two factors, the first reads the residual stream and the second writes it. A
    LayerNorm is an RMS norm of the centred stream: what is written is centred, and the norm's bias
    becomes one of the linears that read it.
    """
    at = dict(zip(("residual_in", "residual_mid", "residual_out"), bases, strict=True))
    norms = _block_norms(kind)
    new: dict[str, Tensor] = {}
    for norm in norms:
        scale = norm_scale(weights.get(f"{norm.role}.weight"), norm, like=bases[0]) * gain
        shift = weights.get(f"{norm.role}.bias")
        for role in kind.readers(norm.role):
            reader = _part(weights, role, "first")
            new[f"{reader}.weight"] = rotated_rows(
                weights[f"{reader}.weight"], basis=at[norm.over], scale=scale
            )
            if shift is not None:
                new |= _shifted(weights, role, shift)
    layered = any(norm.kind == "layer" for norm in norms)
    for linear in kind.linears:
        if not linear.writes.startswith("residual"):
            continue
        axes = written_axes(at[linear.writes], centred=layered)
        writer = _part(weights, linear.role, "second")
        new[f"{writer}.weight"] = _rotated_columns(weights[f"{writer}.weight"], axes)
        if f"{writer}.bias" in weights:
            bias = weights[f"{writer}.bias"]
            new[f"{writer}.bias"] = (axes.T @ bias.to(torch.float64)).to(bias.dtype)
    # The norms are folded into the weights that read them.
    folded = {f"{norm.role}.{part}" for norm in norms for part in ("weight", "bias")}
    return {k: v.clone() for k, v in weights.items() if k not in {*new, *folded}} | new


def norm_scale(
    weight: Tensor | None, norm: Norm, *, like: Float[Tensor, "hidden keep"]
) -> Float[Tensor, " hidden"]:
    """Return the scale of a norm in float64; ones where it stores none."""
    if weight is None:
        return torch.ones(len(like), dtype=torch.float64, device=like.device)
    scale = weight.to(torch.float64)
    return scale + 1 if norm.plus_one else scale


def written_axes(basis: Float[Tensor, "hidden keep"], *, centred: bool) -> Tensor:
    """Return the map to a basis of what is written; it also subtracts the mean if ``centred``."""
    return basis - basis.mean(dim=0, keepdim=True) if centred else basis


def _shifted(weights: Weights, role: str, shift: Tensor) -> dict[str, Tensor]:
    """Return the bias of a linear after that of the norm that it reads has moved into it."""
    moved = shift.to(torch.float64)
    for part in (role, f"{role}.first", f"{role}.second"):
        if f"{part}.weight" in weights:
            moved = weights[f"{part}.weight"].to(torch.float64) @ moved
    name = f"{_part(weights, role, 'second')}.bias"
    old = weights.get(name)
    return {name: (moved if old is None else moved + old.to(torch.float64)).to(shift.dtype)}


def _part(weights: Weights, name: str, factor: str) -> str:
    """Return the name of a linear, or of one of its two factors if it has been factored."""
    return name if f"{name}.weight" in weights else f"{name}.{factor}"


def _rotated_columns(weight: Tensor, basis: Tensor) -> Tensor:
    if _is_identity(basis):
        return weight.clone()
    axes = basis.to(_rotation_dtype(weight))
    rotated = weight.new_empty(basis.shape[1], weight.shape[1])
    blocks = (torch.split(t, BLOCK, dim=1) for t in (weight, rotated))
    for block, into in zip(*blocks, strict=True):
        into.copy_(axes.T @ block.to(axes.dtype))
    return rotated


def _rotation_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the product that rotates a weight.

    Its rounding is that of one more product in a float32 forward pass and does not accumulate;
    float64 takes twice the time on a CPU, and 32 to 64 times on most GPUs.
    """
    return torch.promote_types(weight.dtype, torch.float32)


def _is_identity(basis: Tensor) -> bool:
    dim, keep = basis.shape
    return dim == keep and torch.equal(basis, torch.eye(dim).to(basis))


def rotated_rows(
    rows: Float[Tensor, "rows hidden"], *, basis: Tensor, scale: Tensor | None = None
) -> Float[Tensor, "rows keep"]:
    """Return weights whose rows read a site, rotated to a basis after scaling by the norm."""
    rotates, axes = not _is_identity(basis), basis.to(_rotation_dtype(rows))
    rotated = rows.new_empty(len(rows), basis.shape[1])
    # Written block by block: copies of full size, or of all blocks, would double the memory.
    for block, into in zip(*(torch.split(t, BLOCK) for t in (rows, rotated)), strict=True):
        scaled = block.to(axes.dtype)
        if scale is not None:
            scaled = scaled * scale.to(axes.dtype)
        into.copy_(scaled @ axes if rotates else scaled)
    return rotated


def _site_kind(options: Mapping[str, Option]) -> str:
    return "normed_gram" if options["pca_on"] == "normed" else "gram"


def _statistics(shape: ModelShape, options: Mapping[str, Option]) -> frozenset[Statistic]:
    if options["schedule"] == "sequential":
        return frozenset()  # the dense model's activations differ from those after sliced sites
    taps = ["resid_attn", *["resid_mlp"] * any(not kind.parallel for kind in shape.kinds)]
    if options["slice_head"] or options["rotation"] == "shared":
        taps.append("resid_out")  # else the last site keeps its full width
    return frozenset(Statistic(tap, _site_kind(options)) for tap in taps)


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    reasons = [kind.space("residual").reason for kind in shape.kinds]
    if any(reasons):
        return next(filter(None, reasons))
    if options["rotation"] == "shared" and "residual" not in shape.native:
        return (
            f"rotation=shared makes a stock model, but no config of model type {shape.model_type} "
            "describes one with a narrower stream; choose rotation=per_site"
        )
    if options["head_shortcut"] and not shape.tied:
        return "head_shortcut=true keeps a tied head tied, and the head of this model is not"
    if options["head_shortcut"] and (shape.is_centred or options["rotation"] == "shared"):
        return (
            "head_shortcut=true needs RMS norms, which leave the mean of the embedding as it is, "
            "and rotation=per_site"
        )
    return _refuses_schedule(shape, options) or refuses_division(shape, options)


def _refuses_schedule(shape: ModelShape, options: Mapping[str, Option]) -> str:
    parallel = any(kind.parallel for kind in shape.kinds)
    if options["schedule"] == "sequential" and (shape.is_centred or parallel):
        return (
            "schedule=sequential slices between attention and MLP, one after the other, behind RMS "
            f"norms; the layers of a {shape.model_type} are others: choose schedule=dense"
        )
    if options["schedule"] == "sequential" and options["rotation"] == "shared":
        return (
            "schedule=sequential slices each site before the next is observed, but rotation=shared "
            "needs all sites for its one basis; choose schedule=dense or rotation=per_site"
        )
    return ""


def sliced_form(
    shape: ModelShape, start: Start, keep_dim: int, options: Mapping[str, Option]
) -> ModelForm:
    """Return the widths of the model with a residual stream of ``keep_dim``."""
    native, shortcut = options["rotation"] == "shared", bool(options["head_shortcut"])
    last_dim = keep_dim if native or options["slice_head"] else shape.hidden
    layers = [
        with_biases(
            replace(
                layer,
                residual_in=keep_dim,
                residual_mid=keep_dim if layer.residual_mid else 0,
                residual_out=keep_dim,
                shortcuts=not native,
                norm_weights=native,
            ),
            {*layer.biases, *_shifted_roles(shape.kind(layer))},
        )
        for layer in start.form.layers
    ]
    layers[-1] = replace(layers[-1], residual_out=last_dim)
    return replace(
        start.form,
        layers=tuple(layers),
        embedding_dim=keep_dim,
        head_dim=last_dim,
        head_norm_weight=native,
        tied=shortcut,
        native=native,
        head_shortcut=shortcut,
        head_bias=start.form.head_bias or shape.final_norm.bias,
    )


def _shifted_roles(kind: LayerKind) -> list[str]:
    """Return the linears that get the bias of a norm."""
    biased = (norm.role for norm in _block_norms(kind) if norm.bias)
    return [role for norm in biased for role in kind.readers(norm)]


def _form(
    shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
) -> ModelForm:
    step = width_steps(shape, options)["residual"]
    if options["rotation"] == "shared" and not start.form.native:
        raise PlanError(
            "rotation=shared needs a stock model, but the earlier steps produce one that is not",
            hint="use rotation=per_site, or make this the first step",
        )
    if options["rotation"] == "shared":
        # transformers rejects a hidden size that is not divisible by the number of heads.
        step = math.lcm(step, shape.num_heads)
    if target.slice is not None:
        keep_dim = math.floor((1 - target.slice) * shape.hidden + 1e-9)  # 0.7 * 10 must be 7
        # Full width is kept even if it is not a multiple of the step: nothing is sliced.
        keep_dim -= 0 if keep_dim == shape.hidden else keep_dim % step
        if keep_dim < 1:
            raise PlanError(
                f"slice {target.slice} of width {shape.hidden} in steps of {step} leaves nothing",
                hint=f"the smallest width is {step}: --slice {1 - step / shape.hidden:.4f}",
            )
        return sliced_form(shape, start, keep_dim, options)
    widths = [*range(step, shape.hidden, step), shape.hidden]
    keep_dim = largest_width(
        widths,
        lambda width: sliced_form(shape, start, width, options),
        budget=budget_of(shape, start, target),
    )
    return sliced_form(shape, start, keep_dim, options)


SPEC = MethodSpec(
    name="slicegpt",
    revision=3,
    source="arXiv:2401.15024",
    modules=("residual",),
    residual=True,
    options=(
        OptionSpec(
            name="rotation",
            default="per_site",
            choices=("per_site", "shared"),
            help="one basis per site, with shortcut matrices, or one for all: a stock model",
        ),
        OptionSpec(
            name="pca_on",
            default="residual",
            choices=("residual", "normed"),
            help="principal axes of the residual stream, or of its tokens scaled to equal norm",
        ),
        MULTIPLE_OF,
        TENSOR_PARALLEL,
        OptionSpec(
            name="slice_head",
            default=False,
            choices=(False, True),
            help="slice the last site and the head too (the published program does not)",
        ),
        OptionSpec(
            name="head_shortcut",
            default=False,
            choices=(False, True),
            help="keep a tied head tied, with one more matrix before it: where the vocabulary is "
            "most of a model, its second copy costs more than the slices save",
        ),
        OptionSpec(
            name="schedule",
            default="dense",
            choices=("dense", "sequential"),
            help="all sites at once from the dense model, or one after the other, each after the "
            "sites that are already sliced: slower, and usually a little better",
        ),
        OptionSpec(
            name="shards",
            default=8,
            minimum=1,
            help="schedule=sequential: number of parts of the tokens, which pass a site in "
            "parallel on different workers; another number changes how sums round",
        ),
    ),
    statistics=_statistics,
    refuses=_refuses,
    form=_form,
)


class SliceGPT:
    """The tensor functions of the method; no state."""

    def site_kind(self, options: Mapping[str, Option]) -> str:
        """Return the kind of statistic whose axes a site keeps."""
        return _site_kind(options)

    def factor(
        self, grams: list[Tensor], *, keep_dim: int, where: str, centred: bool = False
    ) -> Basis:
        """Return the basis of one site; of all sites together where several grams are given.

        At full width any orthogonal basis is exact, so the model's own axes are used: they need
        no product, which matters most for the head of a large vocabulary.

        Args:
            grams: of the width of the residual stream; empty for a site of full width.
            keep_dim: axes to keep.
            where: names the site in errors.
            centred: only the centred stream matters, whose gram follows from that of the stream.

        Raises:
            NumericsError: a gram is not finite or cannot be decomposed.
        """
        if not grams:
            empty = torch.empty(0, dtype=torch.float64)
            return Basis(vectors=torch.eye(keep_dim).to(empty), values=empty, rung="whole")
        gram = grams[0] if len(grams) == 1 else shared_gram(grams)
        gram = centred_gram(gram) if centred else gram
        basis = site_basis(gram, keep_dim=keep_dim, where=where)
        whole = keep_dim == len(basis.vectors)
        return replace(basis, vectors=torch.eye(keep_dim).to(basis.vectors)) if whole else basis

    def apply(
        self,
        weights: Weights,
        bases: tuple[Tensor, Tensor, Tensor],
        *,
        shape: ModelShape,
        form: LayerForm,
    ) -> dict[str, Tensor]:
        """Return the tensors of one layer between the bases of its three sites."""
        kind = shape.kind(form)
        if not form.shortcuts:
            return narrowed_layer(weights, kind=kind, basis=bases[0])
        return sliced_layer(weights, kind=kind, bases=bases)

    def apply_embedding(self, rows: Tensor, basis: Tensor, *, shape: ModelShape) -> Tensor:
        """Return rows of a table that is added to the stream, in the basis of the first site."""
        return rotated_rows(rows, basis=written_axes(basis, centred=shape.is_centred))

    def apply_head(
        self,
        rows: Tensor,
        basis: Tensor,
        *,
        shape: ModelShape,
        norm_weight: Tensor | None,
        native: bool,
    ) -> Tensor:
        """Return rows of the head, which read the last site, with the final norm's scale."""
        gain = math.sqrt(basis.shape[0] / basis.shape[1]) if native else 1.0
        scale = norm_scale(norm_weight, shape.final_norm, like=basis) * gain
        return rotated_rows(rows, basis=basis, scale=scale)

    def head_shortcut(
        self, first: Tensor, last: Tensor, *, shape: ModelShape, norm_weight: Tensor | None
    ) -> Tensor:
        """Return ``Q_0^T diag(g) Q_L``, from the stream of the last site to the embedding's basis.

        So a tied head stays tied: ``x Q_L (Q_L^T diag(g) Q_0) (E Q_0)^T`` is ``x diag(g) E^T`` at
        full width.
        """
        scale = norm_scale(norm_weight, shape.final_norm, like=last)
        return first.T @ (scale[:, None] * last)

    def head_bias(self, rows: Tensor, norm_bias: Tensor) -> Tensor:
        """Return what the final norm's bias adds to the logits of these rows, in float64."""
        return rows.to(torch.float64) @ norm_bias.to(torch.float64)


METHOD = SliceGPT()
