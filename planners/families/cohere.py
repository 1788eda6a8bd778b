"""Command R: attention and MLP side by side behind one LayerNorm without bias.

In the second generation (``cohere2``) layers without a sliding window have no rope.
"""

from dataclasses import replace

from planners.families._config import positive
from planners.families._decoder import (
    FULL,
    LAYER_NORM,
    SLIDING,
    Config,
    Facts,
    by_layer,
    decoder,
    listed,
    llama_like,
    require,
)

NORM = replace(LAYER_NORM, bias=False)


def _facts(config: Config, rotary: int) -> Facts:
    wiring = {"pairs": "interleaved", "norm": NORM, "parallel": True, "norms": 1}
    found = replace(llama_like(config, rotary, **wiring), final_norm=NORM, native=("mlp",))
    if config["model_type"] == "cohere":
        return found
    (roped,), (bare,) = found.kinds, llama_like(config, 0, **wiring).kinds
    count = positive(config, "num_hidden_layers")
    if config.get("layer_types") is None:
        pattern = positive(config, "sliding_window_pattern", 4)
        types = [SLIDING if (layer + 1) % pattern else FULL for layer in range(count)]
    else:
        types = listed(config, "layer_types", (FULL, SLIDING), count)
    kinds, own_kinds = by_layer([roped if each == SLIDING else bare for each in types])
    return replace(found, kinds=kinds, own_kinds=own_kinds)


def _check(config: Config) -> None:
    require(config, use_qk_norm=False)


FAMILY = decoder(
    name="cohere",
    classes={"cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM"},
    defaults={
        "cohere": {
            "tie_word_embeddings": True,
            "attention_bias": False,
            "max_position_embeddings": 8192,
        },
        "cohere2": {
            "tie_word_embeddings": True,
            "attention_bias": False,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
        },
    },
    facts=_facts,
    check=_check,
    eps="layer_norm_eps",
    norms={"attn_norm": "input_layernorm"},
)
