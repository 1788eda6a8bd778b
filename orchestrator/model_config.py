"""The ``config.json`` of a result, from that of the model it is made of and its widths."""

from collections.abc import Mapping
from typing import Any

from planners.families import load as load_family
from planners.plan import ModelForm, ModelShape, to_json

AUTO_MAP = {
    "AutoConfig": "modeling_compressed.CompressedConfig",
    "AutoModel": "modeling_compressed.CompressedModel",
    "AutoModelForCausalLM": "modeling_compressed.CompressedForCausalLM",
}


def result_config(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return the config of a model of these widths; ``config`` may be compressed already."""
    kept = {k: v for k, v in config.items() if k != "torch_dtype"}  # dtype's old name
    return (_native if form.native else _remote)({**kept, "dtype": shape.dtype}, shape, form)


def _native(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return the stock config of the narrower model; eps makes up for the narrower norm."""
    layer = form.layers[0]
    width = layer.residual_in
    return {
        **config,
        # The config of a model that was saved without its head names a class that has none.
        "architectures": [load_family(shape.family).classes[shape.model_type]],
        "hidden_size": width,
        "head_dim": shape.head_dim,
        "intermediate_size": layer.intermediate,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * shape.hidden / width,
        "tie_word_embeddings": form.tied,
    }


def _remote(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return a config for the modelling file that travels with the result."""
    kept = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "model_type")}
    windowed = shape.model_type != "qwen2" or config.get("use_sliding_window", False)
    return {
        **kept,
        "architectures": ["CompressedForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "compress_cluster",
        "compressed_from": shape.model_type,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "sliding_window": config.get("sliding_window") if windowed else None,
        "qkv_bias": shape.qkv_bias,
        "mlp_bias": shape.mlp_bias,
        "tie_word_embeddings": form.tied,
        "embedding_dim": form.embedding_dim,
        "head_input_dim": form.head_dim,
        "head_norm_weight": form.head_norm_weight,
        "layer_forms": to_json(form.layers),
    }
