"""Phi 1, 1.5 and 2: attention and an MLP of two linears side by side behind one LayerNorm."""

from dataclasses import replace

from planners.families._decoder import (
    LAYER_NORM,
    LINEARS,
    Config,
    Facts,
    decoder,
    llama_like,
    require,
)
from planners.model.layer import ATTENTION, ROLES


def _facts(config: Config, rotary: int) -> Facts:
    del config
    layer = llama_like(
        {}, rotary, gated=False, norm=LAYER_NORM, biases=frozenset(ROLES), parallel=True, norms=1
    )
    return replace(layer, final_norm=LAYER_NORM, head_bias=True, native=("mlp",))


def _check(config: Config) -> None:
    require(config, qk_layernorm=False)


FAMILY = decoder(
    name="phi",
    classes={"phi": "PhiForCausalLM"},
    defaults={"phi": {"partial_rotary_factor": 0.5, "max_position_embeddings": 2048}},
    facts=_facts,
    check=_check,
    keys={"head_dim": ""},
    eps="layer_norm_eps",
    partial=True,
    linears={
        **{role: LINEARS[role] for role in ATTENTION[:3]},
        "o_proj": "self_attn.dense",
        "up_proj": "mlp.fc1",
        "down_proj": "mlp.fc2",
    },
    norms={"attn_norm": "input_layernorm"},
    activation="mlp.activation_fn",
    final_norm="final_layernorm",
    dropout="resid_pdrop",
)
