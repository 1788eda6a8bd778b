"""Seed-OSS: a Llama with a key for each of its biases."""

from dataclasses import replace

from planners.families._config import flag
from planners.families._decoder import MLP, QKV, STOCK, Config, Facts, decoder, llama_like


def _facts(config: Config, rotary: int) -> Facts:
    biases = QKV if flag(config, "attention_bias", default=True) else ()
    biases += ("o_proj",) if flag(config, "attention_out_bias", default=False) else ()
    biases += MLP if flag(config, "mlp_bias", default=False) else ()
    return replace(llama_like(config, rotary, biases=frozenset(biases)), native=STOCK)


FAMILY = decoder(
    name="seed_oss",
    classes={"seed_oss": "SeedOssForCausalLM"},
    defaults={
        "seed_oss": {
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
        }
    },
    facts=_facts,
)
