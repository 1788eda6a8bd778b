"""The integers of a model, and the kinds of its layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from planners.model.layer import LayerKind, Linear, Norm, Space


class OfKind(Protocol):
    """A layer, such as a `planners.model.form.LayerForm`."""

    @property
    def kind(self) -> int:
        """Its kind, as an index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer as data: all that planning needs to know about it.

    Attributes:
        family: file in ``planners/families`` that names its tensors.
        model_type: ``model_type`` of its ``config.json``.
        num_layers: decoder blocks.
        hidden: width of the residual stream.
        intermediate: inner width of the MLP.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: width of one head.
        vocab_size: rows of the embedding.
        tied: the head is the embedding's tensor and is stored once.
        kinds: of layers.
        own_kinds: the kind of each layer, an index into ``kinds``; empty where all are alike.
        final_norm: the norm before the head.
        head_bias: the head has a bias.
        positions: rows of a table of learned positions that is added to the embedding; 0 without.
        native: the spaces that a stock config can narrow in all layers alike; ``heads`` are those
            of q and k with those of v and o.
        dtype: storage type of the weights, ``float32``, ``bfloat16`` or ``float16``.
    """

    family: str
    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    kinds: tuple[LayerKind, ...]
    own_kinds: tuple[int, ...] = ()
    final_norm: Norm = field(default_factory=lambda: Norm(role="final_norm"))
    head_bias: bool = False
    positions: int = 0
    native: tuple[str, ...] = ("residual", "mlp")
    dtype: str = "float32"

    @property
    def num_sites(self) -> int:
        """Sites of the residual stream: two a layer and the one the head reads."""
        return 2 * self.num_layers + 1

    @property
    def is_centred(self) -> bool:
        """Whether the norms subtract the mean: then only the centred residual stream matters."""
        return any(norm.kind == "layer" for kind in self.kinds for norm in kind.norms)

    @property
    def kind_of(self) -> tuple[int, ...]:
        """The kind of each layer, as an index into ``kinds``."""
        return self.own_kinds or (0,) * self.num_layers

    def kind(self, layer: OfKind) -> LayerKind:
        """Return the kind of a layer."""
        return self.kinds[layer.kind]


def narrower(shape: ModelShape, head_dim: int) -> ModelShape:
    """Return the shape of the model with narrower heads, all channels of which rope rotates."""
    kinds = tuple(replace(kind, rotary=head_dim if kind.rotary else 0) for kind in shape.kinds)
    return replace(shape, head_dim=head_dim, kinds=kinds)


def shape_from_json(data: Mapping[str, Any]) -> ModelShape:
    """Return the shape that `to_json` wrote."""
    kinds = tuple(
        LayerKind(
            **{
                **kind,
                "linears": tuple(Linear(**each) for each in kind["linears"]),
                "norms": tuple(Norm(**each) for each in kind["norms"]),
                "spaces": tuple(Space(**each) for each in kind["spaces"]),
            }
        )
        for kind in data["kinds"]
    )
    return ModelShape(
        **{
            **data,
            "kinds": kinds,
            "own_kinds": tuple(data["own_kinds"]),
            "native": tuple(data["native"]),
            "final_norm": Norm(**data["final_norm"]),
        }
    )
