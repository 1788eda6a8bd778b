"""SmolLM3: a Llama in which every fourth layer has no rope."""

from dataclasses import replace

from planners.families._config import positive
from planners.families._decoder import STOCK, Config, Facts, by_layer, decoder, listed, llama_like


def _facts(config: Config, rotary: int) -> Facts:
    count = positive(config, "num_hidden_layers")
    if config.get("no_rope_layers") is None:
        interval = positive(config, "no_rope_layer_interval")
        has_rope = [int((layer + 1) % interval != 0) for layer in range(count)]
    else:
        has_rope = listed(config, "no_rope_layers", (0, 1), count)
    (roped,), (bare,) = (llama_like(config, each).kinds for each in (rotary, 0))
    kinds, own_kinds = by_layer([roped if rope else bare for rope in has_rope])
    found = llama_like(config, rotary)
    return replace(found, kinds=kinds, own_kinds=own_kinds, native=STOCK)


FAMILY = decoder(
    name="smollm3",
    classes={"smollm3": "SmolLM3ForCausalLM"},
    defaults={
        "smollm3": {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
        }
    },
    facts=_facts,
)
