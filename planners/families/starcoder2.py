"""StarCoder2: LayerNorms, all biases or none, and an MLP of two linears."""

from dataclasses import replace

from planners.families._config import flag
from planners.families._decoder import LAYER_NORM, LINEARS, Config, Facts, decoder, llama_like
from planners.model.layer import ATTENTION, ROLES


def _facts(config: Config, rotary: int) -> Facts:
    biases = frozenset(ROLES if flag(config, "use_bias", default=True) else ())
    layer = llama_like({}, rotary, gated=False, norm=LAYER_NORM, biases=biases)
    return replace(layer, final_norm=LAYER_NORM, native=("mlp",))


FAMILY = decoder(
    name="starcoder2",
    classes={"starcoder2": "Starcoder2ForCausalLM"},
    defaults={
        "starcoder2": {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_bias": True,
            "max_position_embeddings": 4096,
        }
    },
    facts=_facts,
    keys={"head_dim": ""},
    eps="norm_epsilon",
    linears={
        **{role: LINEARS[role] for role in ATTENTION},
        "up_proj": "mlp.c_fc",
        "down_proj": "mlp.c_proj",
    },
    activation="mlp.act",
    dropout="residual_dropout",
)
