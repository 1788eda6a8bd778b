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
from actors.numerics.packed import Symmetric, diagonal
from planners.budget.widths import largest_width
from planners.errors import PlanError
from planners.method import MethodSpec, Option, OptionSpec, Target
from planners.model.cost import model_parameters
from planners.model.form import LayerForm, ModelForm, Start
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


def sliced_layer(weights: Weights, *, bases: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one layer between three bases, shortcuts included.

    Args:
        weights: role -> tensor: ``q_proj.weight`` ... ``attn_norm.weight`` ...; a linear may be
            two factors, and inner widths may be cut.
        bases: (hidden, keep) each: of the site that attention reads, of the site that the MLP
            reads, and of the next layer's first site.
    """
    basis_in, basis_mid, basis_out = bases
    new = _between(weights, bases)
    dtype = weights["attn_norm.weight"].dtype
    new["attn_shortcut.weight"] = (basis_mid.T @ basis_in).to(dtype)
    new["mlp_shortcut.weight"] = (basis_out.T @ basis_mid).to(dtype)
    return new


def narrowed_layer(weights: Weights, *, basis: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one layer in a basis that all sites share: a stock layer.

    A stock norm divides by the root mean square over the kept width d', ours over the original
    width D: the factor sqrt(D / d') is folded into the weights that read the norm, and
    eps' = eps D / d'.
    """
    hidden, keep = basis.shape
    new = _between(weights, (basis, basis, basis), gain=math.sqrt(hidden / keep))
    dtype = weights["attn_norm.weight"].dtype
    ones = torch.ones(keep, dtype=dtype, device=basis.device)
    return new | {"attn_norm.weight": ones, "mlp_norm.weight": ones.clone()}


def _between(
    weights: Weights, bases: tuple[Tensor, Tensor, Tensor], *, gain: float = 1.0
) -> dict[str, Tensor]:
    """Return all tensors but the norms, with inputs and outputs rotated and cut, in their dtypes.

    In a linear of two factors, the first reads the residual stream and the second writes it.
    """
    basis_in, basis_mid, basis_out = bases
    reads = {
        "q_proj": ("attn_norm", basis_in),
        "k_proj": ("attn_norm", basis_in),
        "v_proj": ("attn_norm", basis_in),
        "gate_proj": ("mlp_norm", basis_mid),
        "up_proj": ("mlp_norm", basis_mid),
    }
    new: dict[str, Tensor] = {}
    for name, (norm, basis) in reads.items():
        scale = weights[f"{norm}.weight"].to(torch.float64) * gain
        reader = _part(weights, name, "first")
        new[f"{reader}.weight"] = rotated_rows(
            weights[f"{reader}.weight"], basis=basis, scale=scale
        )
    for name, basis in {"o_proj": basis_mid, "down_proj": basis_out}.items():
        writer = _part(weights, name, "second")
        new[f"{writer}.weight"] = _rotated_columns(weights[f"{writer}.weight"], basis)
        if f"{writer}.bias" in weights:
            bias = weights[f"{writer}.bias"]
            new[f"{writer}.bias"] = (basis.T @ bias.to(torch.float64)).to(bias.dtype)
    norms = (
        "attn_norm.weight",
        "mlp_norm.weight",
    )  # their scale is folded into the weights that read them
    return {k: v.clone() for k, v in weights.items() if k not in (*new, *norms)} | new


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
    del shape
    if options["schedule"] == "sequential":
        return frozenset()  # the dense model's activations differ from those after sliced sites
    taps = ["resid_attn", "resid_mlp"]
    if options["slice_head"] or options["rotation"] == "shared":
        taps.append("resid_out")  # else the last site keeps its full width
    return frozenset(Statistic(tap, _site_kind(options)) for tap in taps)


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    del shape  # every family so far has its norms before the blocks
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
    native = options["rotation"] == "shared"
    last_dim = keep_dim if native or options["slice_head"] else shape.hidden
    layers = [
        replace(
            layer,
            residual_in=keep_dim,
            residual_mid=keep_dim,
            residual_out=keep_dim,
            shortcuts=not native,
            norm_weights=native,
        )
        for layer in start.form.layers
    ]
    layers[-1] = replace(layers[-1], residual_out=last_dim)
    return ModelForm(
        layers=tuple(layers),
        embedding_dim=keep_dim,
        head_dim=last_dim,
        head_norm_weight=native,
        tied=False,
        native=native,
    )


def _form(
    shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
) -> ModelForm:
    step = int(options["round_to"])
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
        lambda width: model_parameters(shape, sliced_form(shape, start, width, options)),
        before=start.parameters_before,
        keep_fraction=target.keep_fraction or 1.0,
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
        OptionSpec(name="round_to", default=8, minimum=1, help="kept width is a multiple of this"),
        OptionSpec(
            name="slice_head",
            default=False,
            choices=(False, True),
            help="slice the last site and the head too (the published program does not)",
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

    def factor(self, grams: list[Tensor], *, keep_dim: int, where: str) -> Basis:
        """Return the basis of one site; of all sites together where several grams are given.

        At full width any orthogonal basis is exact, so the model's own axes are used: they need
        no product, which matters most for the head of a large vocabulary.

        Args:
            grams: of the width of the residual stream; empty for a site of full width.
            keep_dim: axes to keep.
            where: names the site in errors.

        Raises:
            NumericsError: a gram is not finite or cannot be decomposed.
        """
        if not grams:
            empty = torch.empty(0, dtype=torch.float64)
            return Basis(vectors=torch.eye(keep_dim).to(empty), values=empty, rung="whole")
        gram = grams[0] if len(grams) == 1 else shared_gram(grams)
        basis = site_basis(gram, keep_dim=keep_dim, where=where)
        whole = keep_dim == len(basis.vectors)
        return replace(basis, vectors=torch.eye(keep_dim).to(basis.vectors)) if whole else basis

    def apply(
        self, weights: Weights, bases: tuple[Tensor, Tensor, Tensor], *, form: LayerForm
    ) -> dict[str, Tensor]:
        """Return the tensors of one layer between the bases of its three sites."""
        if not form.shortcuts:
            return narrowed_layer(weights, basis=bases[0])
        return sliced_layer(weights, bases=bases)

    def apply_embedding(self, rows: Tensor, basis: Tensor) -> Tensor:
        """Return rows of the embedding in the basis of the first site."""
        return rotated_rows(rows, basis=basis)

    def apply_head(
        self, rows: Tensor, basis: Tensor, *, norm_weight: Tensor, native: bool
    ) -> Tensor:
        """Return rows of the head, which read the last site, with the final norm's scale."""
        gain = math.sqrt(basis.shape[0] / basis.shape[1]) if native else 1.0
        return rotated_rows(rows, basis=basis, scale=norm_weight.to(torch.float64) * gain)


METHOD = SliceGPT()
