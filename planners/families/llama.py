"""Llama and the models with the same tensor names: Mistral and Qwen2."""

from collections.abc import Mapping
from typing import Any

from planners.errors import ModelError
from planners.families._base import Family
from planners.families._config import check_rope, check_settings, flag, positive
from planners.model.layer import ATTENTION, ROLES, decoder_layer
from planners.model.shape import ModelShape

MAX_LAYERS = 4096
FULL, SLIDING = "full_attention", "sliding_attention"  # the layer_types of Qwen2

# The defaults of transformers for absent keys, where its model types differ.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the sliding window of each layer as transformers reads the keys; None is no window.

    A Llama has no windows, a Mistral one for all layers. A Qwen2 has one only with
    ``use_sliding_window``, and then from layer ``max_window_layers`` on, or in the layers that
    ``layer_types`` names.

    Raises:
        ModelError: a key has a value that transformers cannot run, or runs as another architecture.
    """
    model_type, count = config["model_type"], positive(config, "num_hidden_layers")
    config = {**DEFAULTS[model_type], **config}
    if model_type == "llama":
        return (None,) * count
    if model_type == "mistral":
        if "layer_types" in config:
            raise ModelError(
                "config.json: has layer_types: transformers then reads a mistral as a ministral, "
                "which is not supported; remove the key if sliding_window holds for all layers"
            )
        return (config["sliding_window"],) * count
    used = flag(config, "use_sliding_window", default=False)
    window = config["sliding_window"] if used else None
    if config.get("layer_types") is not None:
        return _listed_windows(config["layer_types"], window, count)
    first = config["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int):
        raise ModelError(f"config.json: max_window_layers is {first!r}; it must be an integer")
    return tuple(window if i >= first else None for i in range(count))


def _listed_windows(kinds: object, window: int | None, count: int) -> tuple[int | None, ...]:
    if not isinstance(kinds, list) or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise ModelError(f"config.json: layer_types must be a list of {FULL} and {SLIDING}")
    if len(kinds) != count:
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {count} layers")
    if SLIDING in kinds and window is None:
        raise ModelError(
            f"config.json: layer_types has {SLIDING}, but there is no window: set "
            "use_sliding_window and sliding_window, or write full_attention"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def shape_of(config: Mapping[str, Any], dtype: str) -> ModelShape:
    """Return the shape that a ``config.json`` describes.

    Raises:
        ModelError: a key is missing, of the wrong type or impossible; the message names it.
    """
    hidden = positive(config, "hidden_size")
    num_layers = positive(config, "num_hidden_layers")
    num_heads = positive(config, "num_attention_heads")
    model_type = config["model_type"]
    kv_default = num_heads  # also for null
    if "num_key_value_heads" not in config:
        kv_default = DEFAULTS[model_type].get("num_key_value_heads", num_heads)
    num_kv_heads = positive(config, "num_key_value_heads", kv_default)
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
    windows(config)
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
        kinds=(decoder_layer(rotary=head_dim, biases=_biases(config)),),
        dtype=dtype,
    )


def _biases(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the roles of the linears with a bias; only a Llama's config has keys for them."""
    if config["model_type"] != "llama":
        return frozenset(ATTENTION[:3] if config["model_type"] == "qwen2" else ())
    attention = flag(config, "attention_bias", default=False)
    mlp = flag(config, "mlp_bias", default=False)
    return frozenset((ATTENTION if attention else ()) + (ROLES[4:] if mlp else ()))


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
    attention="self_attn",
    activation="mlp.act_fn",
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    shape_of=shape_of,
)
