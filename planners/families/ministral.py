"""Ministral: a Mistral whose layers have a sliding window or none."""

from planners.families._decoder import decoder

FAMILY = decoder(
    name="ministral",
    classes={"ministral": "MinistralForCausalLM"},
    defaults={
        "ministral": {
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        }
    },
)
