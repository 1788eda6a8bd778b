"""Llama and the models with the same tensor names: Mistral and Qwen2."""

from collections.abc import Mapping
from typing import Any

from planners.errors import ModelError
from planners.families._config import flag, positive
from planners.families._decoder import FULL, QKV, SLIDING, Facts, decoder, llama_like

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


def _facts(config: Mapping[str, Any], rotary: int) -> Facts:
    """Only a Llama's config has keys for biases; a Qwen2 has those of q, k and v."""
    if config["model_type"] == "llama":
        return llama_like(config, rotary)
    biases = frozenset(QKV if config["model_type"] == "qwen2" else ())
    return llama_like({}, rotary, biases=biases)


def _check(config: Mapping[str, Any]) -> None:
    windows(config)


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
