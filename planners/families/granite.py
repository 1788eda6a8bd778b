"""Granite: a Llama whose embedding, attention, residual stream and logits are multiplied."""

from planners.families._config import number
from planners.families._decoder import Config, Facts, decoder, llama_like


def _facts(config: Config, rotary: int) -> Facts:
    scale = number(config, "residual_multiplier", 1.0)
    return llama_like(config, rotary, residual_scale=scale)


FAMILY = decoder(
    name="granite",
    classes={"granite": "GraniteForCausalLM"},
    defaults={
        "granite": {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048}
    },
    facts=_facts,
)
