"""Llama and the families that copy its names: Mistral and Qwen2."""

from collections.abc import Mapping
from typing import Any

from planners.errors import ModelError
from planners.families._base import Family
from planners.families._config import check_rope, check_settings, flag, positive
from planners.plan import ModelShape

MAX_LAYERS = 4096


def shape_of(config: Mapping[str, Any], dtype: str) -> ModelShape:
    """Return the shape that a ``config.json`` describes.

    Raises:
        ModelError: a key is missing, of the wrong type or impossible; the message names it.
    """
    hidden = positive(config, "hidden_size")
    num_layers = positive(config, "num_hidden_layers")
    num_heads = positive(config, "num_attention_heads")
    num_kv_heads = positive(config, "num_key_value_heads", num_heads)
    head_dim = positive(config, "head_dim", max(hidden // num_heads, 1))
    if num_layers > MAX_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers {num_layers} is over {MAX_LAYERS}")
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim {head_dim} is odd; rotary embedding needs pairs")
    check_settings(config)
    check_rope(config, head_dim=head_dim)
    attention_bias = flag(config, "attention_bias", default=False)
    model_type = config["model_type"]
    return ModelShape(
        family="llama",
        model_type=model_type,
        num_layers=num_layers,
        hidden=hidden,
        intermediate=positive(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=positive(config, "vocab_size"),
        tied=flag(config, "tie_word_embeddings", default=False),
        qkv_bias=model_type == "qwen2" or (model_type == "llama" and attention_bias),
        o_bias=model_type == "llama" and attention_bias,
        mlp_bias=model_type == "llama" and flag(config, "mlp_bias", default=False),
        dtype=dtype,
    )


FAMILY = Family(
    name="llama",
    classes={
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    },
    base="model",
    layer="model.layers.{i}",
    linears={
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.o_proj",
        "gate_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "down_proj": "mlp.down_proj",
    },
    norms={"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    shape_of=shape_of,
)
