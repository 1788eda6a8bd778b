"""A decoder-only transformer whose layers each have their own widths.

This file travels with every compressed checkpoint that a stock config cannot express, and is loaded
with ``trust_remote_code=True``. It needs torch and transformers, nothing else.

Each layer is built from its entry of ``config.layer_forms``: widths of the residual stream before,
between and after its two blocks (with *shortcut* matrices on the residual where they differ in
basis), inner width of the MLP, head widths of q/k and of v/o, and ranks of the linears that are
stored as two factors. Three things stay those of the original model whatever was cut: the norm's
denominator (``hidden_size``), the rotary tables and the softmax scale (``head_dim``).

A stored config has the ``model_type`` of the original model, by which transformers chooses a
tokenizer, and a ``hidden_act`` that no stock class has, so that none is built around these weights.
"""

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
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

# What a stock class says that it does not know, in place of an activation.
NEEDS_CODE = "made by compress-cluster: load it with trust_remote_code=True"
FULL, SLIDING = "full_attention", "sliding_attention"


class CompressedConfig(LlamaConfig):
    """The original model's config, with the widths of every layer beside it."""

    model_type = "compress_cluster"
    base_model_tp_plan = None  # shortcuts and odd widths do not divide over devices in general
    base_model_pp_plan = None

    layer_forms: list[dict[str, Any]] | None = None
    embedding_dim: int = 0
    head_input_dim: int = 0
    head_norm_weight: bool = True
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    compressed_from: str | None = None
    compression: dict[str, Any] | None = None

    def __post_init__(self, activation: str | None = None, **kwargs: Any) -> None:
        """Take the activation from where it is stored; without ``layer_types`` layers are alike."""
        if activation is not None:
            self.hidden_act = activation
        if self.layer_types is None:
            kind = FULL if self.sliding_window is None else SLIDING
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what is stored, under the model type that it has here."""
        stored, rest = super().get_config_dict(*args, **kwargs)
        return {**stored, "model_type": cls.model_type}, rest

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored."""
        stored = super().to_dict()
        if len(set(stored["layer_types"])) == 1:
            del stored["layer_types"]  # a mistral with the key is read as another architecture
        return {
            **stored,
            "model_type": self.compressed_from or self.model_type,
            "hidden_act": NEEDS_CODE,
            "activation": self.hidden_act,
        }

    def validate_architecture(self) -> None:
        """Accept any widths: they are the point."""


MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


class ScaledRMSNorm(nn.Module):
    """Root mean square norm that divides by the original width, whatever is left of it."""

    def __init__(self, dim: int, original_dim: int, eps: float, *, scale: bool) -> None:
        super().__init__()
        self.original_dim = original_dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / sqrt(sum(x^2) / original_dim + eps)``, computed in float32."""
        x32 = x.to(torch.float32)
        mean_square = x32.square().sum(-1, keepdim=True) / self.original_dim
        normed = (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
        return normed if self.weight is None else self.weight * normed


class LowRankLinear(nn.Module):
    """Two factors in place of one matrix: ``x -> second(first(x))``."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, rank, bias=False)
        self.second = nn.Linear(rank, out_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with both factors."""
        return self.second(self.first(x))


def _linear(form: dict[str, Any], name: str, dims: tuple[int, int]) -> nn.Module:
    (out_dim, in_dim), bias = dims, name in form["biases"]
    rank = form["ranks"].get(name)
    if rank is None:
        return nn.Linear(in_dim, out_dim, bias=bias)
    return LowRankLinear(in_dim, out_dim, rank, bias=bias)


class CompressedMLP(nn.Module):
    """Gated MLP between two widths of the residual stream."""

    def __init__(self, config: CompressedConfig, form: dict[str, Any]) -> None:
        super().__init__()
        inner, mid, out = form["intermediate"], form["residual_mid"], form["residual_out"]
        self.gate_proj = _linear(form, "gate_proj", (inner, mid))
        self.up_proj = _linear(form, "up_proj", (inner, mid))
        self.down_proj = _linear(form, "down_proj", (out, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``down(act(gate(x)) * up(x))``."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class CompressedAttention(nn.Module):
    """Attention whose q/k and v/o heads may be narrower than the model's own."""

    def __init__(self, config: CompressedConfig, form: dict[str, Any], layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.qk_head_dim = form["qk_head_dim"]
        self.vo_head_dim = form["vo_head_dim"]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        kinds = config.layer_types
        windowed = kinds is not None and kinds[layer_idx] == SLIDING
        self.sliding_window = config.sliding_window if windowed else None
        read = form["residual_in"]
        q, k, v = heads * self.qk_head_dim, kv_heads * self.qk_head_dim, kv_heads * self.vo_head_dim
        self.q_proj = _linear(form, "q_proj", (q, read))
        self.k_proj = _linear(form, "k_proj", (k, read))
        self.v_proj = _linear(form, "v_proj", (v, read))
        out_dims = (form["residual_mid"], heads * self.vo_head_dim)
        self.o_proj = _linear(form, "o_proj", out_dims)
        if self.qk_head_dim != config.head_dim:
            pairs = torch.arange(self.qk_head_dim // 2).repeat(kv_heads, 1)
            self.register_buffer("rope_pairs", pairs)  # (kv_heads, kept pairs)
        else:
            self.rope_pairs = None

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x (batch, heads, tokens, dim) turned by the angles of the pairs it kept."""
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (batch, 1, tokens, head_dim)
        if self.rope_pairs is not None:
            pairs = self.rope_pairs.repeat_interleave(x.shape[1] // self.rope_pairs.shape[0], dim=0)
            both = torch.cat((pairs, pairs), dim=-1)  # (heads, dim): both halves turn alike
            index = both[None, :, None, :].expand(cos.shape[0], -1, cos.shape[2], -1)
            cos = cos.expand(-1, x.shape[1], -1, -1).gather(-1, index)
            sin = sin.expand(-1, x.shape[1], -1, -1).gather(-1, index)
        return x * cos + rotate_half(x) * sin

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output, (batch, tokens, residual_mid), and weights if computed."""
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.qk_head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.qk_head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, -1, self.vo_head_dim).transpose(1, 2)
        query, key = (self._turned(x, *position_embeddings) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class CompressedDecoderLayer(GradientCheckpointingLayer):
    """One block: two additions to the residual stream, which may change its basis at each."""

    def __init__(self, config: CompressedConfig, layer_idx: int) -> None:
        super().__init__()
        form = config.layer_forms[layer_idx]  # type: ignore[index] # None only in a bare config
        width, eps, scale = config.hidden_size, config.rms_norm_eps, form["norm_weights"]
        self.input_layernorm = ScaledRMSNorm(form["residual_in"], width, eps, scale=scale)
        self.self_attn = CompressedAttention(config, form, layer_idx)
        self.post_attention_layernorm = ScaledRMSNorm(form["residual_mid"], width, eps, scale=scale)
        self.mlp = CompressedMLP(config, form)
        self.attn_shortcut: nn.Module = nn.Identity()
        self.mlp_shortcut: nn.Module = nn.Identity()
        if form["shortcuts"]:
            into, mid, out = form["residual_in"], form["residual_mid"], form["residual_out"]
            self.attn_shortcut = nn.Linear(into, mid, bias=False)
            self.mlp_shortcut = nn.Linear(mid, out, bias=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the residual stream after the block."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + attended
        inner = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.mlp_shortcut(hidden_states) + inner


class CompressedPreTrainedModel(PreTrainedModel):
    """What the base model and the language model share."""

    config_class = CompressedConfig
    base_model_prefix = "model"
    _no_split_modules = ("CompressedDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    _can_record_outputs = {  # noqa: RUF012 transformers' own form
        "hidden_states": CompressedDecoderLayer,
        "attentions": CompressedAttention,
    }


class CompressedModel(CompressedPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.embedding_dim, config.pad_token_id
        )
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([CompressedDecoderLayer(config, i) for i in layers])
        self.norm = ScaledRMSNorm(
            config.head_input_dim,
            config.hidden_size,
            config.rms_norm_eps,
            scale=config.head_norm_weight,
        )
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden state, (batch, tokens, head_input_dim)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None] + seen
        masks = attention_mask  # one for each kind of layer, as `generate` may give them
        if not isinstance(masks, dict):
            masks = {
                kind: MASKS[kind](
                    config=self.config,
                    inputs_embeds=hidden,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
                for kind in set(self.config.layer_types)
            }
        angles = self.rotary_emb(hidden, position_ids=position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden = layer(
                hidden,
                attention_mask=masks[kind],
                position_embeddings=angles,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


def _kept_positions(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """Return the last so many positions, 0 for all, or those of an index or a mask."""
    if isinstance(keep, int):
        return hidden[:, -keep:]
    if keep.ndim == 1:
        return hidden[:, keep]
    if keep.dtype == torch.bool:
        return hidden[keep]
    return hidden[torch.arange(len(hidden), device=keep.device)[:, None], keep]


class CompressedForCausalLM(CompressedPreTrainedModel, GenerationMixin):
    """The base model with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 transformers' own form

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__(config)
        self.model = CompressedModel(config)
        self.lm_head = nn.Linear(config.head_input_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: PLR0913 transformers' own signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, tokens, vocab), and the loss where labels are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(_kept_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
