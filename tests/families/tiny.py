"""A tiny random model of every supported model type."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planners.families import family_of, known_types

MODEL_TYPES = tuple(known_types())
SIZES = {
    "num_hidden_layers": 2, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
# What a model type has beside or in place of these.
OWN = {
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32},
    "phi": {"num_key_value_heads": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.4, "logits_scaling": 3.0},
    "mistral": {"sliding_window": 5},
}
BIASED = ("attention_bias", "mlp_bias", "use_bias", "attention_out_bias")


def config_of(model_type, *, tied=False, **changes):
    """Return a stock config of a tiny model with all biases that it may have."""
    config = AutoConfig.for_model(model_type)
    biases = {key: True for key in BIASED if hasattr(config, key)}
    given = {**SIZES, **biases, **OWN.get(model_type, {}), "tie_word_embeddings": tied, **changes}
    return AutoConfig.for_model(model_type, **given)


def model_of(config, *, dtype=torch.float64, seed=0):
    """Return a model with random weights, its norms and biases too: ones and zeros hide faults."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.2
            parameter.add_(spread * torch.randn_like(parameter))
    return model.requires_grad_(requires_grad=False)


def shape_of(config, dtype="float32"):
    """Return the family of a config, and the shape that it reads."""
    family = family_of(config.model_type)
    return family, family.shape_of(config.to_dict(), dtype)


def logits_of(model, ids):
    """Return the logits of a model."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def ids_of(seed=0, *, rows=2, tokens=12):
    """Return token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (rows, tokens), generator=generator)
