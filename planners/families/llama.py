"""Llama and the models with the same tensor names: Mistral and Qwen2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planners.errors import ModelError
from planners.families._config import flag
from planners.families._decoder import QKV, SLIDING, STOCK, Facts, decoder, llama_like

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


def _check(config: Mapping[str, Any]) -> None:
    """Refuse windows that transformers cannot run, or runs as another architecture.

    Raises:
        ModelError: the message names the key.
    """
    if config["model_type"] == "mistral" and "layer_types" in config:
        raise ModelError(
            "config.json: has layer_types: transformers then reads a mistral as a ministral",
            hint="set model_type to ministral, or remove layer_types if sliding_window holds for "
            "all layers",
        )
    if config["model_type"] == "qwen2":
        _check_qwen2(config)


def _check_qwen2(config: Mapping[str, Any]) -> None:
    used = flag(config, "use_sliding_window", default=False)
    window = config["sliding_window"] if used else None
    if window is None and SLIDING in (config.get("layer_types") or ()):
        raise ModelError(
            f"config.json: layer_types has {SLIDING}, but there is no window: set "
            "use_sliding_window and sliding_window, or write full_attention"
        )
    first = config["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int):
        raise ModelError(f"config.json: max_window_layers is {first!r}; it must be an integer")


def _facts(config: Mapping[str, Any], rotary: int) -> Facts:
    """Only a Llama's config has keys for biases; a Qwen2 has those of q, k and v."""
    if config["model_type"] == "llama":
        return replace(llama_like(config, rotary), native=STOCK)
    biases = frozenset(QKV if config["model_type"] == "qwen2" else ())
    return replace(llama_like({}, rotary, biases=biases), native=STOCK)


FAMILY = decoder(
    name="llama",
    classes={
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    },
    defaults=DEFAULTS,
    facts=_facts,
    check=_check,
)
