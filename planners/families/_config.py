"""Validate the keys of a ``config.json``: return them with the right type, or refuse them.

Covers keys that determine sizes, would run code, or would give a worker numbers that it cannot use;
transformers validates the rest when it builds a model.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from planners.errors import ModelError

Config = Mapping[str, Any]

MAX_DIM = 2**24  # far above any width or count of a real model; guards allocation sizes
MAX_CHARACTERS = 200  # of a value in a message
MAX_NUMBER = 1e30  # a setting above it is a mistake, and overflows in float32

CHOICES: Mapping[str, tuple[str, ...]] = {
    "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "relu"),
    "dtype": ("float32", "bfloat16", "float16"),
    "torch_dtype": ("float32", "bfloat16", "float16"),
    # Another value may name a repository, whose code would be downloaded and run.
    "attn_implementation": ("sdpa", "eager"),
    "_attn_implementation": ("sdpa", "eager"),
}
REFUSED = {
    "quantization_config": "quantised weights cannot be compressed; use the original ones",
    "compression_config": "quantised weights cannot be compressed; use the original ones",
    "transformers_weights": "weights are read from model.safetensors or its index; remove the key",
    "per_layer_config": "all layers must be alike; remove the key",
}
# rope_type -> the numbers that it needs beside rope_theta.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
ROPE_LISTS = ("short_factor", "long_factor")  # one number for each pair of channels


def positive(config: Config, key: str, default: int | None = None) -> int:
    """Return a size.

    Raises:
        ModelError: it is missing and has no default, or is not a valid size.
    """
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DIM:
        raise ModelError(
            f"config.json: {key} is {_short(value)}; it must be an integer from 1 to {MAX_DIM}"
        )
    return value


def flag(config: Config, key: str, *, default: bool) -> bool:
    """Return a boolean.

    Raises:
        ModelError: it is neither.
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} is {_short(value)}; it must be true or false")
    return value


def check_settings(config: Config) -> None:
    """Refuse keys that request other code or weights, and invalid settings other than widths.

    Raises:
        ModelError: the message names the key.
    """
    for key, why in REFUSED.items():
        if config.get(key):
            raise ModelError(f"config.json: has {key}: {why}")
    for key, choices in CHOICES.items():
        value = config.get(key)
        if value not in (None, *choices):
            raise ModelError(
                f"config.json: {key} is {_short(value)}; it must be one of: {', '.join(choices)}"
            )
    eps = config.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ModelError(
            f"config.json: rms_norm_eps is {_short(eps)}; it must be a small number such as 1e-05"
        )
    if "max_position_embeddings" in config:
        positive(config, "max_position_embeddings")
    positive(config, "sliding_window", 1)  # null in most models
    if config.get("is_causal") not in (None, True):
        raise ModelError(
            "config.json: is_causal is false, so tokens would attend to later ones; only "
            "causal attention is supported"
        )


def check_rope(config: Config, *, head_dim: int) -> None:
    """Refuse rotary settings that are unknown or malformed, in the old spelling or the new.

    Raises:
        ModelError: the message names the key.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"config.json: {key} is {_short(rope)}; it must be an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ModelError(
            f"config.json: {key}: rope_type {_short(kind)} is not supported; supported: "
            + ", ".join(ROPE_TYPES)
        )
    settings = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
    for name in ("rope_theta", *ROPE_TYPES[kind]):
        value = settings.get(name)
        count = head_dim // 2 if name in ROPE_LISTS else 0
        if not (_are_positive(value, count) if count else _is_positive(value)):
            wanted = f"a list of {count} numbers" if count else "a number"
            raise ModelError(
                f"config.json: {key}: {name} is {_short(value)}; it must be {wanted} above 0"
            )
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ModelError(f"config.json: {key}: high_freq_factor is not above low_freq_factor")
    if any(c.get("partial_rotary_factor") not in (None, 1) for c in (config, rope)):
        raise ModelError("config.json: partial_rotary_factor is not supported; it must be 1")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER


def _are_positive(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_positive, values))


def _short(value: object) -> str:
    """Return a value for a message: one line, truncated if long."""
    return "missing" if value is None else reprlib.repr(value)[:MAX_CHARACTERS]
