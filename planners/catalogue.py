"""Models with a short name, and their published configs, so that a plan needs no download."""

from collections.abc import Mapping
from typing import Any

from planners.families import load
from planners.model.shape import ModelShape


def _llama(  # noqa: PLR0913 the integers of a model
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    longest: int, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": longest,
        "dtype": dtype,
    }


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096, "float16"),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096, "float16"),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096, "float16"),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, "bfloat16"),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, 8192, "bfloat16"),
}


def shape_of(name: str) -> ModelShape:
    """Return the shape of a model of the catalogue."""
    config = CONFIGS[name]
    return load("llama").shape_of(config, config["dtype"])
