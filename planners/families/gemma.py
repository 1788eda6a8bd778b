"""Gemma 1: a Llama whose norms store their scale less one, with a scaled embedding."""

from dataclasses import replace

from planners.families._decoder import RMS, Config, Facts, decoder, llama_like

NORM = replace(RMS, plus_one=True)


def _facts(config: Config, rotary: int) -> Facts:
    return replace(llama_like(config, rotary, norm=NORM), final_norm=NORM, native=("mlp", "heads"))


FAMILY = decoder(
    name="gemma",
    classes={"gemma": "GemmaForCausalLM"},
    defaults={
        "gemma": {
            "max_position_embeddings": 8192,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "attention_bias": False,
        }
    },
    facts=_facts,
)
