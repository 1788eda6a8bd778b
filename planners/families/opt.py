"""OPT: LayerNorms, biases, an MLP of two linears and learned positions."""

from dataclasses import replace

from planners.families._config import flag, positive
from planners.families._decoder import LAYER_NORM, Config, Facts, decoder, llama_like, require
from planners.model.layer import ATTENTION, ROLES

OFFSET = 2  # the table of positions begins with two rows that are not used


def _facts(config: Config, rotary: int) -> Facts:
    affine = flag(config, "layer_norm_elementwise_affine", default=True)
    norm = replace(LAYER_NORM, scale=affine, bias=affine)
    biases = frozenset(ROLES if flag(config, "enable_bias", default=True) else ())
    return replace(
        llama_like({}, rotary, gated=False, norm=norm, biases=biases),
        final_norm=norm,
        native=("mlp",),
        positions=positive(config, "max_position_embeddings") + OFFSET,
    )


def _check(config: Config) -> None:
    """Refuse OPT-350m: norms behind the additions, and an embedding narrower than the stream."""
    require(config, do_layer_norm_before=True, _remove_final_layer_norm=False)
    if config.get("word_embed_proj_dim") is not None:
        require(config, word_embed_proj_dim=config["hidden_size"])


FAMILY = decoder(
    name="opt",
    classes={"opt": "OPTForCausalLM"},
    defaults={
        "opt": {
            "tie_word_embeddings": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "max_position_embeddings": 2048,
        }
    },
    facts=_facts,
    check=_check,
    keys={"intermediate_size": "ffn_dim", "num_key_value_heads": "", "head_dim": ""},
    eps="",
    rope=False,
    base="model.decoder",
    linears={
        **{role: f"self_attn.{role}" for role in ATTENTION[:3]},
        "o_proj": "self_attn.out_proj",
        "up_proj": "fc1",
        "down_proj": "fc2",
    },
    norms={"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"},
    activation="activation_fn",
    activation_key="activation_function",
    final_norm="final_layer_norm",
    positions="embed_positions",
    dropout="dropout",
)
