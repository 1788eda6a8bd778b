"""The ``config.json`` of a result, made from that of its input model and its widths."""

from collections.abc import Mapping
from typing import Any

from actors.modeling.narrow_heads import narrowed
from actors.modeling.travelling import COMPRESSED, classes
from actors.storage.quantised import KEY, quantisation_config
from planners.canonical_json import to_json
from planners.families import load as load_family
from planners.model.form import ModelForm
from planners.model.scheme import Scheme
from planners.model.shape import ModelShape, narrower

AUTO_MAP = {
    "AutoConfig": "modeling_compressed.CompressedConfig",
    "AutoModel": "modeling_compressed.CompressedModel",
    "AutoModelForCausalLM": "modeling_compressed.CompressedForCausalLM",
}

UNREAD = ("pairs", "schemes")  # of a layer: the code of a result does not need them
RARE = ("cores", "links")  # written where a layer has any
# Read by the KV cache of transformers, also where the layers of a model do not read them.
OF_A_CACHE = ("sliding_window", "layer_types", "attention_chunk_size", "kv_sharing_modes")


def result_config(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return the config of a model of these widths; ``config`` may be of a compressed model."""
    kept = {k: v for k, v in config.items() if k != "torch_dtype"}  # dtype's old name
    first = form.layers[0]
    if first.has_stock_heads:
        kept, shape = narrowed(kept, first.pairs), narrower(shape, first.qk_head_dim)
    kept |= {"dtype": form.dtype or shape.dtype}
    if form.is_quantised:
        kept[KEY] = quantisation_config(quantised_modules(shape, form))
    return (_native if form.native else _remote)(kept, shape, form)


def quantised_modules(shape: ModelShape, form: ModelForm) -> dict[str, Scheme]:
    """Return module -> scheme of all quantised matrices."""
    family = load_family(shape.family)
    outside = {"embedding": family.embedding, "head": family.head}
    found = {outside[table].removesuffix(".weight"): s for table, s in form.tables.items()}
    for index, layer in enumerate(form.layers):
        prefix = family.layer.format(i=index)
        found |= {f"{prefix}.{family.below_layer(n)}": s for n, s in layer.schemes.items()}
    return found


def _native(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return the stock config of the narrower model; eps makes up for the narrower norm."""
    layer = form.layers[0]
    width, family = layer.residual_in, load_family(shape.family)
    unread = OF_A_CACHE if shape.model_type == "llama" else ()
    own = {"head_dim": shape.head_dim} if family.head_dim_key else {}
    if family.eps_key:
        own[family.eps_key] = config.get(family.eps_key, 1e-6) * shape.hidden / width
    return {
        **{k: v for k, v in config.items() if k not in unread},
        # The config of a model saved without its head names a class without one.
        "architectures": [family.classes[shape.model_type]],
        "hidden_size": width,
        family.intermediate_key: layer.intermediate,
        "tie_word_embeddings": form.tied,
        **own,
    }


def _remote(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return a config for the modelling file that travels with the result."""
    return {
        **config,
        "architectures": ["CompressedForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": COMPRESSED,
        "compressed_from": shape.model_type,
        "layout": load_family(shape.family).layout(shape),
        "tie_word_embeddings": form.tied,
        "embedding_dim": form.embedding_dim,
        "head_input_dim": form.head_dim,
        "head_norm_weight": form.head_norm_weight,
        "head_bias": form.head_bias,
        "head_shortcut": form.head_shortcut,
        "layer_forms": [
            {
                key: value
                for key, value in to_json(layer).items()
                if key not in UNREAD and (value or key not in RARE)
            }
            for layer in form.layers
        ],
    }


def least_transformers() -> str:
    """Return the oldest transformers release that the code of a result works with."""
    from actors.modeling.modeling_compressed import LEAST_TRANSFORMERS

    return LEAST_TRANSFORMERS


def stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result's config as it is written.

    A result that needs code keeps the original's model type, by which transformers chooses a
    tokenizer, but an activation that no stock class has, so none can be built with these weights.
    """
    if "layer_forms" not in config:
        return dict(config)
    code = classes(config["compressed_from"])
    read = code.CompressedConfig.__dataclass_fields__
    kept = {k: v for k, v in config.items() if k in read or k not in OF_A_CACHE}
    key = config["layout"]["activation_key"]
    activation = config.get(key) or read[key].default
    return {
        **kept,
        "model_type": config["compressed_from"],
        key: code.NEEDS_CODE,
        "activation": activation,
    }
