"""ERNIE 4.5, dense: a Llama whose rope rotates neighbouring channels, all biases or none."""

from planners.families._config import flag
from planners.families._decoder import Config, Facts, decoder, llama_like
from planners.model.layer import ROLES


def _facts(config: Config, rotary: int) -> Facts:
    biases = ROLES if flag(config, "use_bias", default=False) else ()
    return llama_like(config, rotary, pairs="interleaved", biases=frozenset(biases))


FAMILY = decoder(
    name="ernie4_5",
    classes={"ernie4_5": "Ernie4_5ForCausalLM"},
    defaults={
        "ernie4_5": {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "use_bias": False,
        }
    },
    facts=_facts,
)
