"""The ``config.json`` of a result, made from that of its input model and its widths."""

from collections.abc import Mapping
from typing import Any

from planners.canonical_json import to_json
from planners.families import load as load_family
from planners.families._decoder import FULL, SLIDING
from planners.families.llama import DEFAULTS, windows
from planners.model.form import ModelForm
from planners.model.shape import ModelShape

AUTO_MAP = {
    "AutoConfig": "modeling_compressed.CompressedConfig",
    "AutoModel": "modeling_compressed.CompressedModel",
    "AutoModelForCausalLM": "modeling_compressed.CompressedForCausalLM",
}

# Read by transformers, although its classes do not declare them.
STORED = ("auto_map", "rope_theta", "rope_scaling", "original_max_position_embeddings",
          "use_sliding_window", "max_window_layers")  # fmt: skip
OF_A_CACHE = ("sliding_window", "layer_types", "attention_chunk_size", "kv_sharing_modes")


def result_config(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return the config of a model of these widths; ``config`` may be of a compressed model."""
    kept = {k: v for k, v in config.items() if k != "torch_dtype"}  # dtype's old name
    return (_native if form.native else _remote)({**kept, "dtype": shape.dtype}, shape, form)


def _native(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return the stock config of the narrower model; eps makes up for the narrower norm."""
    layer = form.layers[0]
    width = layer.residual_in
    # The layers of a Llama do not read these keys, but the KV cache of transformers does.
    unread = OF_A_CACHE if shape.model_type == "llama" else ()
    return {
        **{k: v for k, v in config.items() if k not in unread},
        # The config of a model saved without its head names a class without one.
        "architectures": [load_family(shape.family).classes[shape.model_type]],
        "hidden_size": width,
        "head_dim": shape.head_dim,
        "intermediate_size": layer.intermediate,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * shape.hidden / width,
        "tie_word_embeddings": form.tied,
    }


def _remote(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return a config for the modelling file that travels with the result."""
    if "layer_forms" not in config:
        config = _with_windows({**DEFAULTS[shape.model_type], **config})
    return {
        **config,
        "architectures": ["CompressedForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "compress_cluster",
        "compressed_from": shape.model_type,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": form.tied,
        "embedding_dim": form.embedding_dim,
        "head_input_dim": form.head_dim,
        "head_norm_weight": form.head_norm_weight,
        "layer_forms": to_json(form.layers),
    }


def _with_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that gives the sliding windows of any model in the same keys."""
    each = windows(config)
    used = [window for window in each if window is not None]
    found = {k: v for k, v in config.items() if k != "layer_types"}
    found |= {"sliding_window": used[0] if used else None}
    found |= {"use_sliding_window": bool(used), "max_window_layers": 0}
    if 0 < len(used) < len(each):  # a mistral with this key is read as another architecture
        found["layer_types"] = [FULL if window is None else SLIDING for window in each]
    return found


def least_transformers() -> str:
    """Return the oldest transformers release that the code of a result works with."""
    from actors.modeling.modeling_compressed import LEAST_TRANSFORMERS

    return LEAST_TRANSFORMERS


def stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result's config as it is written: only the keys that its code reads.

    A result that needs code keeps the original's model type, by which transformers chooses a
    tokenizer, but an activation that no stock class has, so none can be built with these weights.
    """
    if "layer_forms" not in config:
        return dict(config)
    from actors.modeling.modeling_compressed import NEEDS_CODE, CompressedConfig

    read = {*CompressedConfig.__dataclass_fields__, *STORED}
    return {
        **{k: v for k, v in config.items() if k in read},
        "model_type": config["compressed_from"],
        "hidden_act": NEEDS_CODE,
        "activation": config.get("hidden_act") or "silu",
    }
