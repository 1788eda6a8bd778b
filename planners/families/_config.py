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

# Elementwise, so that the inner units of an MLP can be permuted.
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
CHOICES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ACTIVATIONS),
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
    "per_layer_config": "widths of single layers are not supported; remove the key",
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


def number(config: Config, key: str, default: float) -> float:
    """Return a positive number.

    Raises:
        ModelError: it is not one.
    """
    value = config.get(key, default)
    if not _is_positive(value):
        refuse(config, key, "it must be a number above 0")
    return float(value)


def check_settings(config: Config, *, eps: str = "rms_norm_eps") -> None:
    """Refuse keys that request other code or weights, and invalid settings other than widths.

    ``eps`` is the key of the norms' epsilon; empty where it is no key.

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
    value = config.get(eps, 1e-6)
    if not isinstance(value, float) or not 0 < value < 1:
        refuse(config, eps, "it must be a small number such as 1e-05")
    if "max_position_embeddings" in config:
        positive(config, "max_position_embeddings")
    positive(config, "sliding_window", 1)  # null in most models
    if config.get("is_causal") not in (None, True):
        raise ModelError(
            "config.json: is_causal is false, so tokens would attend to later ones; only "
            "causal attention is supported"
        )


def refuse(config: Config, key: str, why: str) -> None:
    """Refuse the value of a key.

    Raises:
        ModelError: always.
    """
    raise ModelError(f"config.json: {key} is {_short(config.get(key))}; {why}")


def check_rope(config: Config, *, head_dim: int, partial: bool = False) -> int:
    """Return how many channels of a head are rotated; refuse unknown or malformed settings.

    The settings are read in their old spelling or the new. ``partial`` says that the family may
    rotate only the first channels of a head.

    Raises:
        ModelError: the message names the key.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"config.json: {key} is {_short(rope)}; it must be an object or null")
    nested = next((name for name, value in rope.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise ModelError(
            f"config.json: {key}: has settings of its own for {nested}; only one set of rotary "
            "settings for all layers is supported"
        )
    kind = rope_type(config)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ModelError(
            f"config.json: {key}: rope_type {_short(kind)} is not supported; supported: "
            + ", ".join(ROPE_TYPES)
        )
    rotary = _rotary(config, rope, head_dim, partial=partial)
    settings = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
    for name in ("rope_theta", *ROPE_TYPES[kind]):
        value = settings.get(name)
        count = rotary // 2 if name in ROPE_LISTS else 0
        if not (_are_positive(value, count) if count else _is_positive(value)):
            wanted = f"a list of {count} numbers" if count else "a number"
            raise ModelError(
                f"config.json: {key}: {name} is {_short(value)}; it must be {wanted} above 0"
            )
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ModelError(f"config.json: {key}: high_freq_factor is not above low_freq_factor")
    return rotary


def rope_type(config: Config) -> Any:
    """Return the kind of scaling that a config has for its rotary frequencies, as it is there."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope.get("rope_type", rope.get("type", "default"))


def _rotary(config: Config, rope: Config, head_dim: int, *, partial: bool) -> int:
    """Return how many channels of a head are rotated, an even number of the first."""
    factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    factor = 1.0 if factor is None else factor
    if factor != 1 and not partial:
        raise ModelError("config.json: partial_rotary_factor is not supported; it must be 1")
    if not _is_positive(factor) or factor > 1:
        raise ModelError(
            f"config.json: partial_rotary_factor is {_short(factor)}; it must be a number above 0 "
            "and at most 1"
        )
    rotary = int(head_dim * factor)
    if rotary % 2 or not rotary:
        raise ModelError(
            f"config.json: head_dim {head_dim} is odd; rotary embedding needs pairs"
            if factor == 1
            else f"config.json: partial_rotary_factor {factor} of head_dim {head_dim} is {rotary} "
            "channels; rotary embedding needs pairs"
        )
    return rotary


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER


def _are_positive(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_positive, values))


def _short(value: object) -> str:
    """Return a value for a message: one line, truncated if long."""
    return "missing" if value is None else reprlib.repr(value)[:MAX_CHARACTERS]
