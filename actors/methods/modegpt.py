"""MoDeGPT (arXiv:2408.09632): shrink the inner width of each module, from statistics alone.

- ``mlp``: Nystrom with ridge leverage on the gram of down_proj's input; down_proj is refitted by
  least squares to the kept units.
- ``qk``: CR decomposition on rope *pairs*, one set per KV head: the score of a pair is
  ``sqrt(E[|q|^2] E[|k|^2])`` of its two channels, which rope does not change. The softmax scale and
  the angles stay those of the original head. Channels that rope leaves as they are may be mixed:
  there the best scores of a rank are given by an SVD (`score_maps`), as in the paper for OPT.
- ``vo``: SVD of ``R [W_o^1 ... W_o^g]`` where ``R^T R`` is the h x h gram of v and all query heads
  of the KV group are concatenated. The same product as with the paper's d x d square root.

A v bias moves into the o bias exactly, because the rows of a softmax sum to one.
Rows are tokens in the formulas; weights are in torch's (out, in) orientation in the code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actors.numerics.gram import symmetric
from actors.numerics.linalg import cholesky_psd, eigh_descending
from actors.numerics.nystrom import Nystrom, nystrom
from actors.numerics.packed import submatrix, unpacked
from actors.numerics.score_maps import ScoreMaps, score_maps
from planners.budget.budgets import budget_of
from planners.budget.candidates import OPTION as CANDIDATES
from planners.budget.candidates import shares
from planners.budget.hull import require_levels
from planners.budget.joint import by_bytes, provisional, smallest_tables, table_choices
from planners.budget.schemes import SCHEMES, TIE, quantised, whole_ladders
from planners.budget.served import (
    PAIR_SCALES,
    PAIRS,
    STOCK,
    head_widths,
    narrows_heads,
    served,
    stock_steps,
)
from planners.budget.steps import MULTIPLE_OF, TENSOR_PARALLEL, refuses_division, width_steps
from planners.budget.widths import by_influence, layer_widths, uniform, width_ladder
from planners.errors import NumericsError, PlanError
from planners.method import Allocation, Ladder, MethodSpec, Option, OptionSpec, Target
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.layer import LayerKind
from planners.model.shape import ModelShape
from planners.model.taps import Statistic, gram_statistics
from planners.refit import OPTION as REFIT
from planners.serving import VLLM_HEAD_DIMS
from planners.spelling import did_you_mean

Weights = Mapping[str, Tensor]
MODULES = ("mlp", "qk", "vo")


def kept_pairs(
    q_energy: Float[Tensor, "heads pairs"], k_energy: Float[Tensor, "kv_heads pairs"], *, keep: int
) -> Int[Tensor, "kv_heads keep"]:
    """Return the rope pairs to keep, ascending, one set per KV head.

    Args:
        q_energy: sum over tokens of the squares of each pair of channels.
        k_energy: likewise.
        keep: pairs to keep.
    """
    kv_heads, pairs = k_energy.shape
    grouped = q_energy.reshape(kv_heads, -1, pairs).sum(dim=1)
    # sqrt(sum_j E_qj E_k) orders pairs as E_k sum_j E_qj does.
    scores = grouped * k_energy
    return scores.topk(keep, dim=1).indices.sort(dim=1).values


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueMaps:
    """The maps that replace v and the output weights of one KV head.

    Attributes:
        values: T, from v to its kept directions.
        outputs: W', from the kept directions to the outputs of all query heads.
        lost: ``||v W - v T W'||_F^2`` over the tokens.
        energy: ``||v W||_F^2`` over the tokens.
        rung: of the damping ladder at which the gram was factored.
    """

    values: Float[Tensor, "h keep"]
    outputs: Float[Tensor, "keep out"]
    lost: float
    energy: float
    rung: str


def value_maps(
    gram: Float[Tensor, "h h"], outputs: Float[Tensor, "h out"], *, keep: int, where: str
) -> ValueMaps:
    """Return T and W' that minimise ``||v W - v T W'||_F`` over the tokens of the gram of v.

    Args:
        gram: ``v^T v`` of one KV head, float64.
        outputs: o_proj's rows of all query heads of the group, concatenated, float64.
        keep: width of the new head.
        where: names the layer and head in errors.
    """
    factor, rung = cholesky_psd(gram, ridge=1e-10, where=where)
    upper = factor.T  # gram = upper^T upper
    weighed = upper @ outputs  # (h, out)
    # Its left singular vectors from an h x h gram: the SVD of the wide matrix is far slower.
    spectrum = eigh_descending(symmetric(weighed @ weighed.T), where=where)
    left = spectrum.vectors[:, :keep]
    energy = spectrum.values.clamp_min(0)
    return ValueMaps(
        values=torch.linalg.solve_triangular(upper, left, upper=True),
        outputs=left.T @ weighed,
        lost=float(energy[keep:].sum()),
        energy=float(energy.sum()),
        rung=rung,
    )


class MoDeGPT:
    """The tensor functions of the method; no state."""

    def compress(  # noqa: PLR0913 as of all methods
        self,
        weights: Weights,
        sums: Mapping[str, Tensor],
        *,
        shape: ModelShape,
        form: LayerForm,
        options: Mapping[str, Option],
        factored: dict[str, Nystrom] | None = None,
        carried: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the tensors of one layer with the widths of ``form``, and the errors of its parts.

        Args:
            weights: role -> dense tensor.
            sums: statistic name -> sum, with ``num_tokens``.
            shape: of the model.
            form: widths to reach.
            options: of the method.
            factored: cache of factorisations that serve all widths, shared between calls.
            carried: is given the Gram matrices of the inputs of linears behind a cut, of those that
                are among ``sums``.

        Raises:
            NumericsError: a gram is not finite, or not positive semi-definite.
        """
        new = dict(weights)
        errors: dict[str, object] = {}
        rungs: dict[str, str] = {}
        behind = {} if carried is None else carried
        # A module that an earlier step has shrunk, in any way, is left unchanged.
        if form.intermediate < _rows(weights, "up_proj"):
            known = {} if factored is None else factored
            if "mlp" not in known:
                known["mlp"] = hidden_factor(weights, sums, options)
            errors["mlp"], kept = _cut_mlp(new, known["mlp"], form.intermediate)
            if carried is not None:
                behind["mlp_hidden.gram"] = submatrix(sums["mlp_hidden.gram"], kept)
            rungs["mlp"] = known["mlp"].rung
            del known  # the largest matrix, freed unless the caller keeps it
        if shape.num_heads * form.qk_head_dim < _rows(weights, "q_proj"):
            kind = shape.kind(form)
            keep = form.qk_head_dim // 2
            _cut_qk(new, sums, shape=shape, kind=kind, keep=keep, pairs=form.pairs)
            if form.has_stock_heads:  # their softmax scale follows their width
                _rescale(new, math.sqrt(form.qk_head_dim / shape.head_dim))
                new.pop("rope_pairs", None)
        if shape.num_kv_heads * form.vo_head_dim < _rows(weights, "v_proj"):
            bias = None if form.has_stock_heads else weights.get("v_proj.bias")
            errors["vo"], rungs["vo"], maps = _cut_vo(
                new, sums, shape=shape, keep=form.vo_head_dim, keep_bias=form.has_stock_heads
            )
            if carried is not None and "o_in.gram" in sums:
                behind["o_in.gram"] = _carried_heads(sums, maps, bias, shape=shape)
        return new, {"errors": errors, "rungs": rungs}


def _rows(weights: Weights, name: str) -> int:
    """Return the output width of a linear, which may be stored as two factors."""
    weight = weights.get(f"{name}.weight")
    return (weights[f"{name}.second.weight"] if weight is None else weight).shape[0]


def hidden_factor(
    weights: Weights, sums: Mapping[str, Tensor], options: Mapping[str, Option]
) -> Nystrom:
    """Return the factorisation that serves every width of a layer's MLP."""
    down = weights["down_proj.weight"].T  # (intermediate, hidden)
    gram = sums["mlp_hidden.gram"]
    return nystrom(gram, down, ridge=float(options["ridge"]), where="tap mlp_hidden")


def _cut_mlp(new: dict[str, Tensor], found: Nystrom, keep: int) -> tuple[float, Tensor]:
    kept, outputs = found.refit(keep, dtype=new["down_proj.weight"].dtype)
    for name in ("gate_proj", "up_proj"):
        if f"{name}.weight" in new:  # not every MLP is gated
            new[f"{name}.weight"] = new[f"{name}.weight"][kept]
        if f"{name}.bias" in new:
            new[f"{name}.bias"] = new[f"{name}.bias"][kept]
    new["down_proj.weight"] = outputs.T.contiguous()
    return found.relative_error(keep), kept


def _cut_qk(
    new: dict[str, Tensor],
    sums: Mapping[str, Tensor],
    *,
    shape: ModelShape,
    kind: LayerKind,
    keep: int,
    pairs: tuple[int, ...] = (),
) -> None:
    """Cut q and k of each KV head to ``keep`` units: rope pairs, or two channels without rope.

    All heads keep the same ``pairs`` where they are given, and the rows of q are multiplied by the
    factor of their head, where ``sums`` have them; else each KV head keeps pairs of its own.
    """
    if kind.rotary < shape.head_dim:
        _mix_qk(new, sums, shape=shape, kind=kind, keep=keep)
        return
    energies = _energies(sums, kind)
    if pairs:
        chosen = torch.tensor(pairs, device=energies[1].device).repeat(shape.num_kv_heads, 1)
    else:
        chosen = kept_pairs(*energies, keep=keep)  # rows are selected, nothing is mixed
    for name in ("q_proj", "k_proj"):
        group = _heads(name, shape) // shape.num_kv_heads
        index = _channels(chosen, kind).repeat_interleave(group, dim=0)
        starts = torch.arange(len(index), device=index.device)[:, None] * shape.head_dim
        rows = (starts + index).flatten()
        for part in _stored(new, name):
            new[part] = new[part][rows]
    if pairs and (scales := sums.get(PAIR_SCALES)) is not None:
        _rescale(new, scales.repeat_interleave(2 * keep))
    new["rope_pairs"] = chosen


def _rescale(new: dict[str, Tensor], factors: "float | Float[Tensor, ' rows']") -> None:
    """Multiply the rows of q."""
    for part in _stored(new, "q_proj"):
        rows = new[part].to(torch.float64)
        by = torch.as_tensor(factors, dtype=torch.float64, device=rows.device)
        new[part] = (rows * by.view(-1, *(1,) * (rows.ndim - 1))).to(new[part].dtype)


def _mix_qk(
    new: dict[str, Tensor],
    sums: Mapping[str, Tensor],
    *,
    shape: ModelShape,
    kind: LayerKind,
    keep: int,
) -> None:
    """Cut q and k of heads with channels that rope leaves as they are; pairs compete with them."""
    heads, first = shape.num_kv_heads, kind.rotary
    maps = [_score_maps(sums, head, shape=shape, first=first) for head in range(heads)]
    rest = torch.stack([found.energy for found in maps])
    scores = rest[:, : rest.shape[1] // 2 * 2].reshape(heads, -1, 2).sum(dim=2)
    if first:
        q_energy, k_energy = _energies(sums, kind)
        # Over all relative rotations a pair has half of the energy of the product.
        of_pairs = q_energy.reshape(heads, -1, first // 2).sum(dim=1) * k_energy / 2
        scores = torch.cat((of_pairs, scores), dim=1)
    best = scores.topk(keep, dim=1).indices.sort(dim=1).values  # (kv_heads, keep)
    pairs = torch.where(best < first // 2, best, -1)
    for name in ("q_proj", "k_proj"):
        axes = _axes(name, pairs, maps, kind=kind, head_dim=shape.head_dim)
        axes = axes.repeat_interleave(_heads(name, shape) // heads, dim=0)  # (heads, h, 2 keep)
        for part in _stored(new, name):
            old = new[part].to(torch.float64).reshape(len(axes), shape.head_dim, -1)
            cut = (axes.transpose(1, 2) @ old).reshape(-1, *new[part].shape[1:])
            new[part] = cut.to(new[part].dtype)
    if first:
        new["rope_pairs"] = pairs


def _heads(name: str, shape: ModelShape) -> int:
    return shape.num_heads if name == "q_proj" else shape.num_kv_heads


def _stored(weights: Weights, name: str) -> list[str]:
    return [part for part in (f"{name}.weight", f"{name}.bias") if part in weights]


def _energies(sums: Mapping[str, Tensor], kind: LayerKind) -> list[Tensor]:
    name = "pair_energy" if kind.pairs == "half" else "adjacent_pair_energy"
    found = {tap: sums[f"{tap}.{name}"] for tap in ("q_rope", "k_rope")}
    for tap, energy in found.items():
        if not torch.isfinite(energy).all():
            raise NumericsError(f"tap {tap}: the energies have entries that are NaN or infinite")
    return list(found.values())


def _channels(pairs: Int[Tensor, "kv_heads keep"], kind: LayerKind) -> Int[Tensor, "kv_heads two"]:
    """Return the channels of pairs: the first of each, then the second, as rope takes them."""
    if kind.pairs == "half":
        return torch.cat((pairs, pairs + kind.rotary // 2), dim=1)
    return torch.cat((2 * pairs, 2 * pairs + 1), dim=1)


def _score_maps(
    sums: Mapping[str, Tensor], head: int, *, shape: ModelShape, first: int
) -> ScoreMaps:
    h, group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    q_gram = sums["q_rope.head_gram"][head * group : (head + 1) * group].sum(dim=0)
    k_gram, total = sums["k_rope.head_gram"][head], sums["k_rope.sum"][head * h : (head + 1) * h]
    centred = k_gram - torch.outer(total, total) / sums["num_tokens"]
    where = f"taps q_rope and k_rope, KV head {head}"
    q_gram, centred = (symmetric(gram[first:, first:]) for gram in (q_gram, centred))
    return score_maps(q_gram, centred, where=where)


def _axes(
    name: str,
    pairs: Int[Tensor, "kv_heads keep"],
    maps: list[ScoreMaps],
    *,
    kind: LayerKind,
    head_dim: int,
) -> Float[Tensor, "kv_heads head_dim two_keep"]:
    """Return the kept directions of each KV head: channels of pairs, then the best of the rest.

    Rope takes the first and the second half of a head as the two channels of its pairs.
    """
    found = []
    for row, scored in zip(pairs, maps, strict=True):
        own = row[row >= 0]
        map_ = scored.queries if name == "q_proj" else scored.keys
        rest = torch.zeros(head_dim, 2 * (len(row) - len(own))).to(map_)
        rest[kind.rotary :] = map_[:, : rest.shape[1]]
        one, two = torch.eye(head_dim).to(map_)[:, _channels(own[None], kind)[0]].chunk(2, dim=1)
        more, others = rest.chunk(2, dim=1)
        found.append(torch.cat((one, more, two, others), dim=1))
    return torch.stack(found)


def _cut_vo(
    new: dict[str, Tensor],
    sums: Mapping[str, Tensor],
    *,
    shape: ModelShape,
    keep: int,
    keep_bias: bool = False,
) -> tuple[float, str, list[ValueMaps]]:
    """Cut v and o; a bias of v moves into that of o, unless it is to be kept.

    Returns:
        The relative error, the rung of the head that needed the most damping, and the maps.
    """
    heads, kv_heads, h = shape.num_heads, shape.num_kv_heads, shape.head_dim
    value, output = new["v_proj.weight"], new["o_proj.weight"]
    kept = new.pop("v_proj.bias", None)
    bias = None if keep_bias else kept
    if bias is not None:
        _move_bias(new, bias, shape)
    out_dim = output.shape[0]
    # o_proj by KV head and query head of its group: (kv, group, h, out).
    rows = output.to(torch.float64).T.reshape(kv_heads, heads // kv_heads, h, out_dim)
    new_v, new_b, new_o, found = [], [], [], []
    for head in range(kv_heads):
        gram = _value_gram(sums, head, bias, h)
        side_by_side = rows[head].transpose(0, 1).reshape(h, -1)  # (h, group * out)
        maps = value_maps(gram, side_by_side, keep=keep, where=f"tap v, KV head {head}")
        new_v.append(maps.values.T @ value[head * h : (head + 1) * h].to(torch.float64))
        if kept is not None:
            new_b.append(maps.values.T @ kept[head * h : (head + 1) * h].to(torch.float64))
        new_o.append(maps.outputs.reshape(keep, -1, out_dim).transpose(0, 1))
        found.append(maps)
    new["v_proj.weight"] = torch.cat(new_v).to(value.dtype)
    if keep_bias and kept is not None:
        new["v_proj.bias"] = torch.cat(new_b).to(value.dtype)
    merged = torch.cat(new_o).reshape(-1, out_dim)  # (heads * keep, out)
    new["o_proj.weight"] = merged.T.to(output.dtype).contiguous()
    lost, energy = (sum(getattr(maps, name) for maps in found) for name in ("lost", "energy"))
    rung = max((maps.rung for maps in found), key=len)
    return math.sqrt(lost / max(energy, 1e-300)), rung, found


def _carried_heads(
    sums: Mapping[str, Tensor], maps: list[ValueMaps], bias: Tensor | None, *, shape: ModelShape
) -> Float[Tensor, "heads_keep heads_keep"]:
    """Return the Gram matrix of o_proj's inputs where each head of v keeps some directions.

    They are exactly what is left of the inputs, without a bias of v that moved into that of o.
    """
    gram = unpacked(sums["o_in.gram"])
    group = shape.num_heads // shape.num_kv_heads
    if bias is not None:
        moved = bias.to(torch.float64).reshape(shape.num_kv_heads, -1)
        own = moved.repeat_interleave(group, dim=0).flatten()
        cross = torch.outer(sums["o_in.sum"], own)
        gram = gram - cross - cross.T + sums["num_tokens"] * torch.outer(own, own)
    h, keep = maps[0].values.shape
    every = torch.zeros(shape.num_heads * h, shape.num_heads * keep).to(gram)
    for head in range(shape.num_heads):
        own_map = maps[head // group].values
        every[head * h : (head + 1) * h, head * keep : (head + 1) * keep] = own_map
    return symmetric(every.T @ gram @ every)


def _value_gram(
    sums: Mapping[str, Tensor], head: int, bias: Tensor | None, h: int
) -> Float[Tensor, "h h"]:
    """Return the gram of v of one KV head, without the bias if that was folded away."""
    gram = sums["v.head_gram"][head]
    if bias is not None:
        own = bias[head * h : (head + 1) * h].to(torch.float64)
        total = sums["v.sum"][head * h : (head + 1) * h]
        cross = torch.outer(total, own)
        gram = gram - cross - cross.T + sums["num_tokens"] * torch.outer(own, own)
    return (gram + gram.T) / 2


def _move_bias(new: dict[str, Tensor], bias: Tensor, shape: ModelShape) -> None:
    """Fold the v bias into the o bias: the weights of a softmax sum to one."""
    output = new["o_proj.weight"].to(torch.float64)
    group = shape.num_heads // shape.num_kv_heads
    spread = bias.to(torch.float64).reshape(shape.num_kv_heads, -1)
    moved = output @ spread.repeat_interleave(group, dim=0).flatten()
    old = new.get("o_proj.bias")
    total = moved if old is None else moved + old.to(torch.float64)
    new["o_proj.bias"] = total.to(bias.dtype)


def _of_model(shape: ModelShape, options: Mapping[str, Option]) -> tuple[str, ...]:
    """Return the modules to compress; by default those that the model's family allows."""
    left = _leaves(shape, options)
    return tuple(module for module in _modules(options) if module not in left)


def _leaves(shape: ModelShape, options: Mapping[str, Option]) -> dict[str, str]:
    if options["modules"] != ",".join(MODULES):
        return {}  # what is asked for by name is refused, not left out
    reasons = {module: _reason(shape, module) for module in _modules(options)}
    return {module: reason for module, reason in reasons.items() if reason}


def _reason(shape: ModelShape, module: str) -> str:
    """Return why a module of the model cannot be compressed, or an empty string."""
    reasons = (kind.space(module).reason for kind in shape.kinds)
    return next(filter(None, reasons), "")


def _modules(options: Mapping[str, Option]) -> tuple[str, ...]:
    if options["servable"] == "native":
        return ("mlp",)
    return tuple(name.strip() for name in str(options["modules"]).split(","))


def _statistics(shape: ModelShape, options: Mapping[str, Option]) -> frozenset[Statistic]:
    wanted = gram_statistics(shape) if SCHEMES.name in options else set()
    modules = _of_model(shape, options)
    if "mlp" in modules:
        wanted.add(Statistic("mlp_hidden", "gram"))
    if "qk" in modules:
        wanted |= _qk_statistics(shape)
    if "vo" in modules:
        wanted.add(Statistic("v", "head_gram"))
    if _measures(options) == "influence":
        wanted.add(Statistic("resid_out", "cosine"))
    if _measures(options) == "damage":
        wanted.add(Statistic("resid_attn", f"probe{options['probe_tokens']}"))
    return frozenset(wanted)


def _qk_statistics(shape: ModelShape) -> set[Statistic]:
    """Return the energies of rope pairs, and Gram matrices of heads with channels rope leaves."""
    found = set()
    for kind in shape.kinds:
        energy = "pair_energy" if kind.pairs == "half" else "adjacent_pair_energy"
        wanted = [energy] * (kind.rotary > 0) + ["head_gram"] * (kind.rotary < shape.head_dim)
        found |= {Statistic(tap, name) for tap in ("q_rope", "k_rope") for name in wanted}
    return found


def _measures(options: Mapping[str, Option]) -> str:
    if options["servable"] == "native":
        return ""  # one FFN width: the budget alone gives it
    return {"uniform": "", "influence": "influence", "marginal": "damage"}[
        str(options["allocation"])
    ]


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    unknown = set(_modules(options)) - set(MODULES)
    if unknown:
        return (
            f"modules has {', '.join(sorted(unknown))}; known: {', '.join(MODULES)}"
            + did_you_mean(min(unknown), MODULES)
        )
    for module in _of_model(shape, options):
        if reason := _reason(shape, module):
            return f"modules has {module}: {reason}"
    if reason := _cannot_serve(shape, options) or refuses_division(shape, options):
        return reason
    if options[REFIT.name] and any(kind.parallel for kind in shape.kinds):
        return "refit=true needs layers whose MLP comes after attention, not beside it"
    try:
        grid = shares(options)
    except ValueError:
        grid = []
    if not grid or not all(0 < share < 1 for share in grid):
        return f"grid is {options['grid']}; it must be fractions between 0 and 1, with commas"
    return ""


def _cannot_serve(shape: ModelShape, options: Mapping[str, Option]) -> str:
    """Return why the model cannot take the form that is asked for, or an empty string."""
    servable = options["servable"]
    if SCHEMES.name in options and (servable, options["allocation"]) != ("remote", "marginal"):
        return (
            "schemes choose widths and bits by measured damage: they need allocation=marginal and "
            "servable=remote; for stock widths use --method gptq, or a step of it"
        )
    if servable == "native" and "mlp" not in shape.native:
        return f"servable=native: no config of model type {shape.model_type} has one FFN width"
    if servable == "narrow_heads" and not narrows_heads(shape):
        return (
            f"servable=narrow_heads: no config of model type {shape.model_type} with these rotary "
            "settings has heads of another width with chosen rope pairs; choose native or remote"
        )
    if servable == "vllm" and not head_widths(shape, "vllm", width_steps(shape, options)):
        return (
            f"servable=vllm: its kernels have head widths {', '.join(map(str, VLLM_HEAD_DIMS))}, "
            f"and none of them is left of {shape.head_dim} in steps of "
            f"{width_steps(shape, options)['qk']}"
        )
    both = {"qk", "vo"} <= set(_of_model(shape, options))
    if servable in ("narrow_heads", "vllm") and not both:
        return f"servable={servable} cuts q, k, v and o to one width: modules must have qk and vo"
    if servable in ("narrow_heads", "vllm") and options["allocation"] != "marginal":
        return (
            f"servable={servable} chooses the width of heads by measured damage: it needs "
            "allocation=marginal"
        )
    return ""


def _compares(shape: ModelShape, options: Mapping[str, Option]) -> bool:
    """Return whether the damage of heads that share their rope pairs is of interest."""
    wanted = options["servable"] in ("narrow_heads", "vllm") or (
        options["servable"] == "auto" and {"qk", "vo"} <= set(_of_model(shape, options))
    )
    return wanted and narrows_heads(shape)


def _ladders(
    shape: ModelShape, layer: LayerForm, options: Mapping[str, Option]
) -> dict[str, Ladder]:
    full, steps = layer_widths(layer), width_steps(shape, options)
    found = {
        module: width_ladder(full[module], module, shares(options), step=steps[module])
        for module in _of_model(shape, options)
    }
    if SCHEMES.name in options:
        return quantised(
            {**whole_ladders(shape, layer), **_not_empty(found)}, shape, layer, options
        )
    if _compares(shape, options) and layer.qk_head_dim == shape.head_dim:
        # A curve for a comparison: every second level has to do.
        found[PAIRS] = replace(found["qk"], levels=tuple(sorted(found["qk"].levels)[::2][::-1]))
    return _not_empty(found)


def _not_empty(ladders: Mapping[str, Ladder]) -> dict[str, Ladder]:
    return {module: ladder for module, ladder in ladders.items() if ladder.sizes}


def _form(
    shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
) -> ModelForm:
    servable, budget = str(options["servable"]), budget_of(shape, start, target)
    if SCHEMES.name in options:
        smallest = smallest_tables(shape, start, stock=False, budget=budget)
        every = [_ladders(shape, layer, options) for layer in start.form.layers]
        tied = options[TIE.name] == "fused"
        found = provisional(every, budget=budget, start=smallest, tied=tied)
        return replace(found, native=False)  # as what damage will choose is
    if servable in ("native", "narrow_heads", "vllm") and not start.form.native:
        raise PlanError(
            f"servable={servable}: needs a stock model, and that which the earlier steps produce "
            "is none",
            hint="make this the first step, or use servable=remote",
        )
    if _measures(options) == "damage":
        ladders = []
        for layer in start.form.layers:
            own = _ladders(shape, layer, options)
            ladders.append({"": {name: own[name] for name in own if name != PAIRS}})
        require_levels(ladders, budget=budget, start=start)
    steps = width_steps(shape, options)
    if servable in STOCK:
        steps = stock_steps(shape, steps)
    form = uniform(
        shape,
        budget=budget,
        modules=_of_model(shape, options),
        steps=steps,
        alike=servable in ("native", "narrow_heads", "vllm"),
        start=start,
    )
    return replace(form, native=servable == "native")


def _allocate(
    shape: ModelShape,
    start: Start,
    target: Target,
    options: Mapping[str, Option],
    findings: list[Mapping[str, object]],
) -> Allocation:
    budget, steps = budget_of(shape, start, target), width_steps(shape, options)
    servable = str(options["servable"])
    if SCHEMES.name in options:
        every = [_ladders(shape, layer, options) for layer in start.form.layers]
        tables = table_choices(start, stock=False)
        tied = str(options[TIE.name]) == "fused"
        return by_bytes(shape, findings, every, tables, budget=budget, start=start, tied=tied)
    if _measures(options) == "influence":
        form = by_influence(
            shape,
            findings,
            budget=budget,
            modules=_of_model(shape, options),
            steps=steps,
            temperature=float(options["temperature"]),
            start=start,
        )
        return Allocation(form=form)
    constraints: list[str] = [servable]
    if servable == "auto":
        constraints = ["remote"]
        if start.form.native:
            constraints += ["native"] * ("mlp" in _of_model(shape, options))
            constraints += ["narrow_heads"] * _compares(shape, options)
    return served(shape, findings, constraints, budget=budget, steps=steps, start=start)


SPEC = MethodSpec(
    name="modegpt",
    revision=2,
    source="arXiv:2408.09632",
    modules=MODULES,
    residual=False,
    cuts_widths=True,
    only_shrinks=True,
    options=(
        OptionSpec(
            name="allocation",
            default="marginal",
            choices=("uniform", "influence", "marginal"),
            help="one ratio for all, by Block Influence, or by measured damage per parameter",
        ),
        OptionSpec(
            name="modules",
            default="mlp,qk,vo",
            help="modules to compress; by default all that the model's family allows",
        ),
        MULTIPLE_OF,
        TENSOR_PARALLEL,
        OptionSpec(
            name="ridge",
            default=1e-3,
            minimum=0,
            help="relative to the mean of the gram's diagonal",
            per_layer=True,
        ),
        OptionSpec(
            name="temperature", default=0.2, minimum=1e-6, help="of the softmax over influence"
        ),
        OptionSpec(
            name="grid",
            default="0.9,0.75,0.6,0.45,0.3,0.15",
            help="kept fractions at which damage is measured",
        ),
        OptionSpec(
            name="damage",
            default="layer",
            choices=("layer", "loss"),
            help="measured as the error of the layer's output, or as the rise of the model's loss, "
            "which passes every cut through all later layers",
        ),
        OptionSpec(
            name="probe_tokens", default=8192, minimum=1, help="tokens on which damage is measured"
        ),
        CANDIDATES,
        SCHEMES,
        TIE,
        REFIT,
        OptionSpec(
            name="servable",
            default="auto",
            choices=("auto", "remote", "native", "narrow_heads", "vllm"),
            help="what is to load the result: remote: any widths, with our modelling file; native: "
            "a stock config, one FFN width; narrow_heads: a stock config with narrower heads too; "
            "vllm: our file, with one head width that its kernels take; auto: a stock config if "
            "its predicted damage is at most 1.15 times that of remote",
        ),
    ),
    statistics=_statistics,
    refuses=_refuses,
    leaves=_leaves,
    form=_form,
    measures=_measures,
    cuts=_modules,
    allocate=_allocate,
    ladders=_ladders,
)
METHOD = MoDeGPT()
