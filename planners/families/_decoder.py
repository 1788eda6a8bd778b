"""Families of layers of attention and an MLP: what they share, so that a file has only the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planners.errors import ModelError
from planners.families._base import Family
from planners.families._config import (
    check_rope,
    check_settings,
    flag,
    positive,
    refuse,
    rope_type,
)
from planners.model.layer import ATTENTION, ROLES, LayerKind, Norm, decoder_layer
from planners.model.shape import ModelShape

Config = Mapping[str, Any]
MAX_LAYERS = 4096
STOCK = ("residual", "mlp", "heads")  # what the config of a Llama can narrow
FULL, SLIDING = "full_attention", "sliding_attention"  # the layer_types of transformers

# The names of a Llama, which most later families have.
LINEARS = {
    **{role: f"self_attn.{role}" for role in ATTENTION},
    **{role: f"mlp.{role}" for role in ROLES[4:]},
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
QKV, MLP = ATTENTION[:3], ROLES[4:]
RMS = Norm(role="final_norm")
LAYER_NORM = Norm(role="final_norm", kind="layer", bias=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a config says of a decoder beside its sizes.

    Attributes:
        kinds: the kinds of its layers.
        own_kinds: the kind of each layer; empty where all are alike.
        final_norm: the norm before the head.
        head_bias: the head has a bias.
        positions: rows of the table of learned positions; 0 without.
        native: the spaces that a stock config can narrow in all layers alike. Not the residual
            stream where norms subtract its mean, its width gives that of heads or a scale.
            ``heads``: q, k, v and o together, where rope takes any frequencies and the softmax
            scale follows the width.
    """

    kinds: tuple[LayerKind, ...]
    own_kinds: tuple[int, ...] = ()
    final_norm: Norm = RMS
    head_bias: bool = False
    positions: int = 0
    native: tuple[str, ...] = ("residual", "mlp")


def llama_like(config: Config, rotary: int, **differences: Any) -> Facts:
    """Return the facts of a Llama, but for the differences, which are those of `decoder_layer`.

    ``attention_bias`` and ``mlp_bias`` are read where the family's defaults have them.
    """
    attention = ATTENTION if flag(config, "attention_bias", default=False) else ()
    mlp = MLP if flag(config, "mlp_bias", default=False) else ()
    layer = {"rotary": rotary, "biases": frozenset(attention + mlp), **differences}
    return Facts(kinds=(decoder_layer(**layer),))


def decoder(  # noqa: PLR0913 what families differ in
    *,
    name: str,
    classes: Mapping[str, str],
    defaults: Mapping[str, Mapping[str, Any]],
    facts: Callable[[Config, int], Facts] = llama_like,
    check: Callable[[Config], None] = lambda _: None,
    keys: Mapping[str, str] | None = None,
    eps: str = "rms_norm_eps",
    rope: bool = True,
    partial: bool = False,
    base: str = "model",
    linears: Mapping[str, str] | None = None,
    norms: Mapping[str, str] | None = None,
    activation: str = "mlp.act_fn",
    activation_key: str = "hidden_act",
    final_norm: str = "norm",
    positions: str = "",
    dropout: str = "",
) -> Family:
    """Return a family of decoders.

    Args:
        name: of the file.
        classes: model_type -> transformers' class.
        defaults: model_type -> key -> what transformers takes where a config lacks the key.
        facts: (config with the defaults, channels of a head that rope rotates) -> what it says.
        check: raises ModelError for a config that cannot be compressed.
        keys: standard key -> the family's own, where it has another.
        eps: the key of the norms' epsilon; empty where it is no key.
        rope: positions are rotations of q and k.
        partial: only the first channels of a head may be rotated.
        base: the path of the module with the embedding, layers and final norm.
        linears: role -> name below the layer.
        norms: role -> name below the layer.
        activation: name below the layer of the MLP's activation.
        activation_key: the config's key for it.
        final_norm: its name below ``base``.
        positions: name below ``base`` of the table of learned positions.
        dropout: see `Family`.
    """
    own = keys or {}

    def shape_of(config: Config, dtype: str) -> ModelShape:
        whole = {**defaults.get(config["model_type"], {}), **config}
        sizes = _sizes(whole, own)
        check_settings(whole, eps=eps)
        rotary = check_rope(whole, head_dim=sizes["head_dim"], partial=partial) if rope else 0
        _check_layer_types(whole, sizes["num_layers"])
        check(whole)
        found = facts(whole, rotary)
        return ModelShape(
            family=name,
            model_type=config["model_type"],
            tied=flag(whole, "tie_word_embeddings", default=False),
            kinds=found.kinds,
            own_kinds=found.own_kinds,
            final_norm=found.final_norm,
            head_bias=found.head_bias,
            positions=found.positions,
            native=_native(found.native, whole),
            dtype=dtype,
            **sizes,
        )

    return Family(
        name=name,
        classes=classes,
        defaults=defaults,
        base=base.partition(".")[0],
        layer=f"{base}.layers.{{i}}",
        linears=LINEARS if linears is None else linears,
        norms=NORMS if norms is None else norms,
        attention="self_attn",
        activation=activation,
        activation_key=activation_key,
        intermediate_key=own.get("intermediate_size", "intermediate_size"),
        head_dim_key=own.get("head_dim", "head_dim"),
        eps_key=eps,
        embedding=f"{base}.embed_tokens.weight",
        positions=f"{base}.{positions}.weight" if positions else "",
        final_norm=f"{base}.{final_norm}.weight",
        head="lm_head.weight",
        dropout=dropout,
        shape_of=shape_of,
    )


def _native(spaces: tuple[str, ...], config: Config) -> tuple[str, ...]:
    """Return them without heads where the frequencies of rope depend on the length of a text."""
    fixed = rope_type(config) not in ("dynamic", "longrope")
    return tuple(space for space in spaces if space != "heads" or fixed)


def _sizes(config: Config, own: Mapping[str, str]) -> dict[str, int]:
    """Return the sizes that a config, completed with defaults, gives; ``own`` as in `decoder`.

    Raises:
        ModelError: a key is missing, of the wrong type or impossible; the message names it.
    """

    def size(key: str, default: int | None = None) -> int:
        return positive(config, own.get(key, key), default)

    hidden, num_layers = size("hidden_size"), size("num_hidden_layers")
    num_heads = size("num_attention_heads")
    num_kv_heads = size("num_key_value_heads", num_heads)  # also for null
    if num_layers > MAX_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers {num_layers} is over {MAX_LAYERS}")
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    return {
        "num_layers": num_layers,
        "hidden": hidden,
        "intermediate": size("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": size("head_dim", max(hidden // num_heads, 1)),
        "vocab_size": size("vocab_size"),
    }


def _check_layer_types(config: Config, num_layers: int) -> None:
    if config.get("layer_types") is not None:
        listed(config, "layer_types", (FULL, SLIDING), num_layers)


def by_layer(kinds: Sequence[LayerKind]) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Return the distinct kinds of layers, and the kind of each layer; none where all are alike."""
    distinct = tuple(dict.fromkeys(kinds))
    return distinct, tuple(map(distinct.index, kinds)) if len(distinct) > 1 else ()


def require(config: Config, **values: Any) -> None:
    """Refuse a config with another value of these keys.

    Raises:
        ModelError: the message names the key.
    """
    for key, value in values.items():
        if config.get(key, value) != value:
            refuse(config, key, f"only {value!r} is supported")


def listed(config: Config, key: str, allowed: Sequence[Any], count: int) -> list[Any]:
    """Return a list with an entry a layer.

    Raises:
        ModelError: it is not a list, has another length, or an entry that is not allowed.
    """
    found = config.get(key)
    if not isinstance(found, list) or not all(entry in allowed for entry in found):
        refuse(config, key, "it must be a list of " + " and ".join(map(str, allowed)))
    assert isinstance(found, list)
    if len(found) != count:
        raise ModelError(f"config.json: {key} has {len(found)} entries for {count} layers")
    return found
