"""Helium: a Llama whose rope rotates neighbouring channels."""

from dataclasses import replace

from planners.families._config import flag, positive, refuse
from planners.families._decoder import MLP, QKV, Config, Facts, decoder, llama_like


def _facts(config: Config, rotary: int) -> Facts:
    biases = QKV if flag(config, "attention_bias", default=False) else ()
    biases += MLP if flag(config, "mlp_bias", default=False) else ()
    found = llama_like(config, rotary, pairs="interleaved", biases=frozenset(biases))
    return replace(found, native=("mlp",))


def _check(config: Config) -> None:
    heads = positive(config, "num_attention_heads") * positive(config, "head_dim")
    if heads != positive(config, "hidden_size"):
        refuse(config, "hidden_size", f"it must be that of all heads, {heads}")


FAMILY = decoder(
    name="helium",
    classes={"helium": "HeliumForCausalLM"},
    defaults={
        "helium": {
            "max_position_embeddings": 4096,
            "num_key_value_heads": 20,
            "head_dim": 128,
            "attention_bias": False,
            "mlp_bias": False,
        }
    },
    facts=_facts,
    check=_check,
)
