"""A stock model of transformers whose layers each have their own widths.

This file travels with every compressed checkpoint that a stock config cannot express, and is loaded
with ``trust_remote_code=True``. It needs torch and transformers, nothing else.

The stock model is built from its own config, and then every layer is given the widths of its entry
of ``config.layer_forms``: those of the residual stream before, between and after its two blocks
(with *shortcut* matrices on the residual where they differ in basis), the inner width of the MLP,
head widths of q/k and of v/o, ranks of the linears that are stored as two factors, and what a
linear takes from the same linear of an earlier layer, where it is stored once.
``config.layout`` has the names of the modules. Three things stay those of the original model
whatever was cut: the norm's denominator, the rotary tables and the softmax scale.

A stored config has the ``model_type`` of the original model, by which transformers chooses a
tokenizer, and an activation that no stock class has, so that none is built around these weights.
"""

import sys
from typing import Any

import torch
import transformers

LEAST_TRANSFORMERS = "5.17"


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


if _release(transformers.__version__) < _release(LEAST_TRANSFORMERS):
    raise ImportError(
        f"this model needs transformers {LEAST_TRANSFORMERS} or later, and found "
        f"{transformers.__version__}: pip install -U 'transformers>={LEAST_TRANSFORMERS}'"
    )

# ruff: noqa: E402 an older transformers lacks some of these
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

STOCK = "llama"  # model_type of the original model; the copy beside a result has its own
# What a stock class says that it does not know, in place of an activation.
NEEDS_CODE = "made by compress-cluster: load it with trust_remote_code=True"

StockConfig: Any = CONFIG_MAPPING[STOCK]
StockModel: Any = MODEL_MAPPING[StockConfig]
StockForCausalLM: Any = MODEL_FOR_CAUSAL_LM_MAPPING[StockConfig]
StockLayer: Any = StockForCausalLM._can_record_outputs["hidden_states"]
StockAttention: Any = StockForCausalLM._can_record_outputs["attentions"]
STOCK_CODE: Any = sys.modules[StockForCausalLM.__module__]


class CompressedConfig(StockConfig):
    """The original model's config, with the widths of every layer beside it.

    Attributes:
        layer_forms: widths and ranks of each layer.
        embedding_dim: width of the embedding, and of learned positions.
        head_input_dim: width of the residual stream that the head reads.
        head_norm_weight: the final norm keeps its scale.
        head_bias: the head has a bias.
        head_shortcut: a matrix follows the final norm, and the head reads what it returns.
        layout: names of the modules, and what the kinds of layers have in common.
        compressed_from: ``model_type`` of the original model.
        compression: how it was made.
    """

    base_model_tp_plan = None  # given back to those whose linears divide as the stock ones do
    base_model_pp_plan = None

    layer_forms: list[dict[str, Any]] | None = None
    embedding_dim: int = 0
    head_input_dim: int = 0
    head_norm_weight: bool = True
    head_bias: bool = False
    head_shortcut: bool = False
    layout: dict[str, Any] | None = None
    compressed_from: str | None = None
    compression: dict[str, Any] | None = None

    def __post_init__(self, activation: str | None = None, **kwargs: Any) -> None:
        """Take the activation from where it is stored."""
        if activation is not None and self.layout is not None:
            setattr(self, self.layout["activation_key"], activation)
        super().__post_init__(**kwargs)
        if self.layout is not None and _divides_over_devices(self):
            self.base_model_tp_plan = StockConfig.base_model_tp_plan

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored."""
        stored = super().to_dict()
        if self.layout is None:  # a bare config, of which transformers takes the defaults
            return stored
        key = self.layout["activation_key"]
        return {**stored, key: NEEDS_CODE, "activation": stored[key]}

    def validate_architecture(self) -> None:
        """Accept any widths: they are the point."""


def _divides_over_devices(config: CompressedConfig) -> bool:
    """Return whether the stock plan for tensor parallelism holds: linears are cut in width alone.

    Shortcuts and pairs of factors are not in the plan, and narrower heads have tables for all heads
    that a device with some of them would have to divide.
    """
    layout, layers = config.layout or {}, config.layer_forms or []
    return not config.head_shortcut and all(
        not form["shortcuts"]
        and not form["ranks"]
        and not form.get("links")
        and (form["qk_head_dim"], form["vo_head_dim"]) == (layout["head_dim"], layout["head_dim"])
        for form in layers
    )


class ScaledNorm(nn.Module):
    """Root mean square norm that divides by the original width, whatever is left of it."""

    def __init__(self, dim: int, original_dim: int, eps: float, *, scale: bool) -> None:
        super().__init__()
        self.original_dim = original_dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if scale else None
        self.shortcut: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / sqrt(sum(x^2) / original_dim + eps)``, computed in float32."""
        x32 = x.to(torch.float32)
        mean_square = x32.square().sum(-1, keepdim=True) / self.original_dim
        normed = (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
        return self.shortcut(normed if self.weight is None else self.weight * normed)


class FactoredLinear(nn.Module):
    """Factors in place of one matrix, some of which may be those of another layer.

    ``x -> second(core(first(x)))``, where the core is a matrix, a diagonal one or none; or
    ``x -> number * source(x) + second(first(x))``, where the source is the matrix of another layer,
    the number may be missing, which is 1, and so may the factors, which are 0.
    """

    def __init__(
        self, dims: tuple[int, int], *, rank: int, rows: int | None, bias: bool, link: Any
    ) -> None:
        super().__init__()
        out_dim, in_dim = dims
        has_source = link is not None and "source" in link["parts"]
        self.source = nn.Linear(in_dim, out_dim, bias=bias) if has_source else None
        self.number = nn.Parameter(torch.ones(1)) if has_source and link["fitted"] else None
        self.first = nn.Linear(in_dim, rank, bias=False) if rank else None
        self.core = nn.Linear(rank, rows, bias=False) if rows else None
        self.diagonal = nn.Parameter(torch.ones(rank)) if rows == 0 else None
        own_bias = bias and not has_source
        self.second = nn.Linear(rows or rank, out_dim, bias=own_bias) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with all factors."""
        changed: Any = None
        if self.first is not None and self.second is not None:
            inner = self.first(x)
            inner = inner if self.core is None else self.core(inner)
            inner = inner if self.diagonal is None else inner * self.diagonal
            changed = self.second(inner)
        if self.source is None:
            return changed
        found: Any = self.source
        whole = nn.functional.linear(x, found.weight)
        whole = whole if self.number is None else whole * self.number
        whole = whole if found.bias is None else whole + found.bias
        return whole if changed is None else whole + changed


class CompressedAttention(StockAttention):
    """The stock attention with narrower heads: of one width in q and k, of another in v and o."""

    def narrow(self, form: dict[str, Any], layout: dict[str, Any]) -> None:
        """Take the widths of the heads from the form of a layer."""
        kind = layout["kinds"][form["kind"]]
        below = layout["attention"] + "."
        self.below = {
            role: name.removeprefix(below)
            for role, name in {**layout["linears"], **layout["norms"]}.items()
        }
        self.head_norms = [role for role in ("q_norm", "k_norm") if role in kind["norms"]]
        self.qk_head_dim, self.vo_head_dim = form["qk_head_dim"], form["vo_head_dim"]
        self.rotary, self.pairs = kind["rotary"], kind["pairs"]
        self.whole_head_dim = layout["head_dim"]
        pairs = None  # (kv_heads, kept pairs of channels); -1 for those that are not rotated
        if self.rotary and self.qk_head_dim != layout["head_dim"]:
            pairs = torch.arange(self.qk_head_dim // 2).repeat(layout["kv_heads"], 1)
        self.register_buffer("rope_pairs", pairs)
        known = "sliding_window" in StockConfig.__dataclass_fields__
        of_all = self.config.sliding_window if known else None
        self.window = getattr(self, "sliding_window", of_all)
        dropout = "attention_dropout" if hasattr(self, "attention_dropout") else "dropout"
        self.dropout_of_weights = getattr(self, dropout)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output, (batch, tokens, residual_mid), and weights if computed."""
        shape = hidden_states.shape[:-1]
        query = self._of("q_proj")(hidden_states).view(*shape, -1, self.qk_head_dim)
        key = self._of("k_proj")(hidden_states).view(*shape, -1, self.qk_head_dim)
        value = self._of("v_proj")(hidden_states).view(*shape, -1, self.vo_head_dim)
        if self.head_norms:
            query, key = self._of("q_norm")(query), self._of("k_norm")(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.rotary and position_embeddings is not None:
            query, key = self._rotated(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, STOCK_CODE.eager_attention_forward
        )
        if self._needs_one_width(query):
            width = max(self.qk_head_dim, self.vo_head_dim)
            query, key, value = (_widened(x, width) for x in (query, key, value))
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout_of_weights if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.window,
            **kwargs,
        )
        output = output[..., : self.vo_head_dim].reshape(*shape, -1).contiguous()
        output = self._of("o_proj")(output)
        # Only some stock attentions have this one; in others it is the layer's.
        left_out = getattr(self, "residual_dropout", 0.0)
        return nn.functional.dropout(output, p=left_out, training=self.training), weights

    def _of(self, role: str) -> nn.Module:
        return getattr(self, self.below[role])

    def _needs_one_width(self, query: Tensor) -> bool:
        """Return whether zeros that make all heads equally wide make attention faster.

        On a CPU torch's fused kernel takes q, k and v of one width only, and the longer a prompt is
        the more it saves. A single query reads all of the cache, and a copy of that costs more.
        Kernels of a GPU take widths that differ.
        """
        return (
            self.qk_head_dim != self.vo_head_dim
            and query.device.type == "cpu"
            and query.shape[2] > 1
            and self.config._attn_implementation == "sdpa"
        )

    def _rotated(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """Return q and k (batch, heads, tokens, dim) rotated as the stock attention does it.

        The pairs of a narrower head are its channels i and i + dim / 2, whatever those of a whole
        head are. Where the stock ones lie in halves too, its formula is applied with the cosines
        and sines of the kept pairs. Other narrower heads are spread over the channels of a whole
        one, rotated there, and collected.
        """
        both, width = (query, key), self.rotary
        rotate = STOCK_CODE.apply_rotary_pos_emb
        if self.rope_pairs is None:
            rotated = rotate(*(x[..., :width] for x in both), cos, sin)
            rest = [x[..., width:] for x in both]
            return [torch.cat(parts, dim=-1) for parts in zip(rotated, rest, strict=True)]
        if self.pairs == "half":
            angles = self._of_kept_pairs(cos, 1.0), self._of_kept_pairs(sin, 0.0)
            return [_rotated_in_halves(x, *angles) for x in both]
        first, second = 2 * self.rope_pairs, 2 * self.rope_pairs + 1
        places = torch.cat((first, second), dim=-1)  # (kv_heads, dim)
        # Channels that are not rotated share a place behind the others.
        places = torch.where(self.rope_pairs.repeat(1, 2) < 0, width, places)
        each = [_by_head(places, x) for x in both]
        spread = [
            x.new_zeros(*x.shape[:-1], width + 1).scatter(-1, at, x)[..., :width]
            for x, at in zip(both, each, strict=True)
        ]
        return [
            torch.where(at < width, wide.gather(-1, at.clamp(max=width - 1)), x)
            for x, at, wide in zip(both, each, rotate(*spread, cos, sin), strict=True)
        ]

    def _of_kept_pairs(self, angles: Tensor, unrotated: float) -> Tensor:
        """Return cos or sin (batch, tokens, width) as (batch, kv_heads, 1, tokens, dim)."""
        pairs = self.rope_pairs.repeat(1, 2)  # (kv_heads, dim)
        if self.rotary == self.whole_head_dim:
            return angles[..., pairs].transpose(1, 2)[:, :, None]
        found = torch.where(pairs < 0, unrotated, angles[..., pairs.clamp(min=0)])
        return found.transpose(1, 2)[:, :, None]


def _rotated_in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (batch, heads, tokens, dim) rotated by angles of (batch, kv_heads, 1, tokens, dim).

    The formula is that of the stock models whose pairs are channels i and i + dim / 2.
    """
    grouped = x.reshape(x.shape[0], cos.shape[1], -1, *x.shape[2:])
    half = x.shape[-1] // 2
    turned = torch.cat((-grouped[..., half:], grouped[..., :half]), dim=-1)
    return (grouped * cos + turned * sin).flatten(1, 2)


def _widened(x: Tensor, width: int) -> Tensor:
    """Return x with zeros behind its channels."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _by_head(places: Tensor, x: Tensor) -> Tensor:
    """Return places (kv_heads, dim) for every element of x (batch, heads, tokens, dim)."""
    each = places.repeat_interleave(x.shape[1] // places.shape[0], dim=0)
    return each[None, :, None, :].expand(x.shape[0], -1, x.shape[2], -1)


def attention_block(layer: nn.Module, facts: dict[str, Any], hidden: Tensor, **kwargs: Any) -> Any:
    """Return what attention adds to the residual stream that a layer of any form reads."""
    normed = layer.get_submodule(facts["norms"]["attn_norm"])(hidden)
    attention = layer.get_submodule(facts["attention"])
    added, *_ = attention(hidden_states=normed, **kwargs)
    return added if facts["residual_scale"] == 1 else added * facts["residual_scale"]


def mlp_block(layer: nn.Module, facts: dict[str, Any], hidden: Tensor) -> Any:
    """Return what the MLP adds to the residual stream that it reads in a layer of any form."""
    norms = facts["norms"]
    normed = layer.get_submodule(norms.get("mlp_norm", norms["attn_norm"]))(hidden)
    act = layer.get_submodule(facts["activation"])
    linears = {role: layer.get_submodule(name) for role, name in facts["linears"].items()}
    up = linears["up_proj"](normed)
    inner = act(linears["gate_proj"](normed)) * up if "gate_proj" in linears else act(up)
    added = linears["down_proj"](inner)
    return added if facts["residual_scale"] == 1 else added * facts["residual_scale"]


class CompressedLayer(StockLayer):
    """The stock layer with matrices on the residual stream, which changes its basis there."""

    def shorten(self, form: dict[str, Any], layout: dict[str, Any]) -> None:
        """Add the shortcuts of the form of a layer."""
        self.facts = facts_of(layout, form)
        into, mid, out = form["residual_in"], form["residual_mid"], form["residual_out"]
        self.attn_shortcut = nn.Linear(into, out if self.facts["parallel"] else mid, bias=False)
        if not self.facts["parallel"]:
            self.mlp_shortcut = nn.Linear(mid, out, bias=False)
        attention = self.get_submodule(self.facts["attention"])
        key = layout["dropout"]
        self.left_out = getattr(attention.config, key) if key else 0.0
        self.attention_leaves_out = hasattr(attention, "residual_dropout")

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the residual stream after the layer."""
        added = attention_block(self, self.facts, hidden_states, **kwargs)
        added = added if self.attention_leaves_out else self._dropped(added)
        middle = self.attn_shortcut(hidden_states) + added
        if self.facts["parallel"]:
            return middle + self._dropped(mlp_block(self, self.facts, hidden_states))
        added = self._dropped(mlp_block(self, self.facts, middle))
        return self.mlp_shortcut(middle) + added

    def _dropped(self, added: Tensor) -> Tensor:
        return nn.functional.dropout(added, p=self.left_out, training=self.training)


def facts_of(layout: dict[str, Any], form: dict[str, Any]) -> dict[str, Any]:
    """Return the facts and names of one layer: those of its kind, and of all layers."""
    kind = layout["kinds"][form["kind"]]
    return {
        **kind,
        "attention": layout["attention"],
        "activation": layout["activation"],
        "linears": {role: layout["linears"][role] for role in kind["linears"]},
        "norms": {role: layout["norms"][role] for role in kind["norms"]},
    }


def _put(parent: nn.Module, name: str, module: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(parent.get_submodule(above), last, module)


def _resize_linear(parent: nn.Module, name: str, dims: tuple[int, int], *, bias: bool) -> None:
    """Replace a linear by one of (out, in), unless it is as it should be."""
    linear: Any = parent.get_submodule(name)
    out_dim, in_dim = dims
    if (*linear.weight.shape, linear.bias is not None) != (out_dim, in_dim, bias):
        _put(parent, name, nn.Linear(in_dim, out_dim, bias=bias))


def _resize_norm(parent: nn.Module, name: str, dims: tuple[int, int], *, scale: bool) -> None:
    """Replace a norm of (width, original width), unless it still is the stock one."""
    if dims[0] == dims[1] and scale:
        return
    norm: Any = parent.get_submodule(name)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    _put(parent, name, ScaledNorm(*dims, eps, scale=scale))


def _resize_table(table: Any, width: int) -> None:
    """Narrow an embedding in place: some stock classes do more than to look up."""
    if table.embedding_dim != width:
        table.weight = nn.Parameter(table.weight.detach().new_empty(len(table.weight), width))
        table.embedding_dim = width
        table._is_hf_initialized = False


def _resize_layer(layer: Any, form: dict[str, Any], layout: dict[str, Any]) -> None:
    """Give a stock layer the widths of a form."""
    kind = layout["kinds"][form["kind"]]
    widths = {
        **{key: form[key] for key in ("residual_in", "residual_mid", "residual_out")},
        "ffn": form["intermediate"],
        "q": layout["heads"] * form["qk_head_dim"],
        "k": layout["kv_heads"] * form["qk_head_dim"],
        "v": layout["kv_heads"] * form["vo_head_dim"],
        "o": layout["heads"] * form["vo_head_dim"],
    }
    ranks, cores, links = (form.get(key, {}) for key in ("ranks", "cores", "links"))
    for role, (reads, writes) in kind["linears"].items():
        name, dims = layout["linears"][role], (widths[writes], widths[reads])
        bias, rank, link = role in form["biases"], ranks.get(role, 0), links.get(role)
        if rank or link is not None:
            rows = cores.get(role)
            _put(layer, name, FactoredLinear(dims, rank=rank, rows=rows, bias=bias, link=link))
        else:
            _resize_linear(layer, name, dims, bias=bias)
    for role, over in kind["norms"].items():
        if over in widths:  # not those of single heads
            dims = (widths[over], layout["hidden"])
            _resize_norm(layer, layout["norms"][role], dims, scale=form["norm_weights"])
    if (form["qk_head_dim"], form["vo_head_dim"]) != (layout["head_dim"], layout["head_dim"]):
        attention: Any = layer.get_submodule(layout["attention"])
        attention.__class__ = CompressedAttention
        attention.narrow(form, layout)
    if form["shortcuts"]:
        layer.__class__ = CompressedLayer
        layer.shorten(form, layout)


def _resize(body: nn.Module, config: Any) -> None:
    """Give a stock base model the widths of its config."""
    layout = config.layout
    below = {  # names in a base model, which has no head
        key: layout[key].removeprefix(StockForCausalLM.base_model_prefix + ".")
        for key in ("layers", "embedding", "positions", "final_norm")
    }
    layers: Any = body.get_submodule(below["layers"])
    for layer, form in zip(layers, config.layer_forms, strict=True):
        _resize_layer(layer, form, layout)
    for key in ("embedding", "positions"):
        if below[key]:
            _resize_table(body.get_submodule(below[key]), config.embedding_dim)
    dims = (config.head_input_dim, layout["hidden"])
    _resize_norm(body, below["final_norm"], dims, scale=config.head_norm_weight)
    if config.head_shortcut:
        norm: Any = body.get_submodule(below["final_norm"])
        norm.shortcut = nn.Linear(config.head_input_dim, config.embedding_dim, bias=False)


def shared_tensors(model: Any) -> dict[str, str]:
    """Return the name of each tensor that a layer takes from another -> the name it is stored by.

    Names are those of the model with its head. None before its layers have been resized.
    """
    config, found = model.config, dict[str, str]()
    if not getattr(model, "is_resized", False):
        return found
    layout = config.layout
    for index, form in enumerate(config.layer_forms):
        for role, link in form.get("links", {}).items():
            if not 0 <= link["layer"] < index:
                continue  # a layer alone, with tensors of its own
            for part in link["parts"]:
                name = layout["linears"][role]
                stored = f"{layout['layers']}.{link['layer']}.{name}"
                stored += "" if part == "source" else f".{part}"
                taken = f"{layout['layers']}.{index}.{name}.{part}"
                found[f"{taken}.weight"] = f"{stored}.weight"
    return found


def _share(model: Any) -> None:
    """Let transformers know which tensors layers take from others, so that they are saved once."""
    model.is_resized = True
    shared, known = shared_tensors(model), model._tied_weights_keys or {}
    if shared:
        model._tied_weights_keys = {**known, **shared}


class CompressedModel(StockModel):
    """The stock base model, resized."""

    config_class = CompressedConfig
    _no_split_modules = (*StockModel._no_split_modules, "CompressedLayer")

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__(config)
        _resize(self, config)
        _share(self)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return what transformers ties, and what layers take from one another."""
        found = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        base = StockForCausalLM.base_model_prefix + "."
        shared = shared_tensors(self).items()
        return found | {a.removeprefix(base): b.removeprefix(base) for a, b in shared}


class CompressedForCausalLM(StockForCausalLM):
    """The stock model with its head, resized."""

    config_class = CompressedConfig
    _no_split_modules = (*StockForCausalLM._no_split_modules, "CompressedLayer")
    _tp_plan = None
    _pp_plan = None

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__(config)
        _resize(self.base_model, config)
        head = config.layout["head"]  # type: ignore[index] # None only in a bare config
        reads = config.embedding_dim if config.head_shortcut else config.head_input_dim
        dims = (config.vocab_size, reads)
        _resize_linear(self, head, dims, bias=config.head_bias)
        _share(self)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return what transformers ties, and what layers take from one another."""
        found = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        return found | shared_tensors(self)
