"""Qwen3: a Llama whose queries and keys are normalised, each head by itself."""

from typing import Any

from planners.families._decoder import HEAD_NORMS, NORMS, RMS, Config, Facts, decoder, llama_like


def _facts(config: Config, rotary: int) -> Facts:
    return llama_like(config, rotary, head_norm=RMS)


DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 32768,
}
FAMILY = decoder(
    name="qwen3",
    classes={"qwen3": "Qwen3ForCausalLM"},
    defaults={"qwen3": DEFAULTS},
    facts=_facts,
    norms={**NORMS, **HEAD_NORMS},
)
