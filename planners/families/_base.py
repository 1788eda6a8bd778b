"""What a model family is: names and integers, not code."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from planners.model.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family of checkpoints names its parts.

    Attributes:
        name: the file's name.
        classes: ``model_type`` of the ``config.json`` files it covers -> transformers' class of it
            with a head.
        base: prefix of the names of all tensors but the head; a model saved without its head has
            names without this prefix.
        layer: prefix of layer ``{i}`` in the state dict.
        linears: role, one of `planners.model.shape.LINEARS`, -> name below the layer.
        norms: ``attn_norm`` and ``mlp_norm`` -> name below the layer.
        embedding: tensor of the embedding.
        final_norm: tensor of the final norm's scale.
        head: tensor of the head; absent in a tied checkpoint.
        shape_of: (config, storage dtype) -> shape; raises ModelError naming the key that is wrong.
    """

    name: str
    classes: Mapping[str, str]
    base: str
    layer: str
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    embedding: str
    final_norm: str
    head: str
    shape_of: Callable[[Mapping[str, Any], str], ModelShape]

    def layer_tensors(
        self, shape: ModelShape, layer: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return role -> (tensor name, shape) of every tensor of one layer.

        Roles are ``q_proj.weight``, ``q_proj.bias``, ``attn_norm.weight`` and so on.
        """
        prefix = self.layer.format(i=layer)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for role, name in self.linears.items():
            out_dim, in_dim = shape.linear_dims(role)
            tensors[f"{role}.weight"] = (f"{prefix}.{name}.weight", (out_dim, in_dim))
            if shape.has_bias(role):
                tensors[f"{role}.bias"] = (f"{prefix}.{name}.bias", (out_dim,))
        for role, name in self.norms.items():
            tensors[f"{role}.weight"] = (f"{prefix}.{name}.weight", (shape.hidden,))
        return tensors

    def with_base(self, name: str) -> str:
        """Return the full name of a tensor of a model that was saved without its head."""
        whole = f"{self.base}.{name}"
        covered = (self.embedding, self.final_norm, self.layer.partition("{")[0])
        return whole if whole.startswith(covered) else name

    def below_layer(self, role: str) -> str:
        """Return the name of a role below its layer, including roles that compression adds."""
        part, dot, rest = role.partition(".")
        names = {**self.linears, **self.norms, "rope_pairs": "self_attn.rope_pairs"}
        return f"{names.get(part, part)}{dot}{rest}"

    def role_of(self, name: str) -> str:
        """Return the role of a name below its layer; the inverse of `below_layer`."""
        names = {**self.linears, **self.norms, "rope_pairs": "self_attn.rope_pairs"}
        for part, below in names.items():
            if name == below or name.startswith(f"{below}."):
                return part + name[len(below) :]
        return name

    def head_among(self, names: Container[str]) -> str:
        """Return the name of the head's tensor in a checkpoint: the embedding's if tied."""
        return self.head if self.head in names else self.embedding

    def outer_tensors(self, shape: ModelShape) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return role -> (tensor name, shape) of the tensors outside the layers."""
        table = (shape.vocab_size, shape.hidden)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "embedding": (self.embedding, table),
            "final_norm": (self.final_norm, (shape.hidden,)),
        }
        if not shape.tied:
            tensors["head"] = (self.head, table)
        return tensors
