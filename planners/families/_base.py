"""What a model family is: names and facts, not code."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planners.model.cost import linear_dims, width_at
from planners.model.form import SOURCE, ModelForm, dense_form
from planners.model.layer import Norm
from planners.model.shape import ModelShape

Dims = tuple[int, ...]


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
        linears: role, one of `planners.model.layer.ROLES`, -> name below the layer.
        norms: ``attn_norm``, ``mlp_norm``, ``q_norm``, ``k_norm`` -> name below the layer.
        attention: name below the layer of the module that attends.
        activation: name below the layer of the module that is the MLP's activation.
        activation_key: the config's key for it.
        dropout: the config's key for the dropout of what attention and MLP add to the residual
            stream; empty where it is no key.
        intermediate_key: the config's key for the inner width of the MLP.
        head_dim_key: the config's key for the width of a head; empty where it is no key.
        eps_key: the config's key for the epsilon of the norms; empty where it is no key.
        defaults: model_type -> key -> the value that transformers takes where a config lacks it.
        embedding: tensor of the embedding.
        positions: tensor of the learned positions; empty without.
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
    attention: str
    activation: str
    activation_key: str
    intermediate_key: str
    head_dim_key: str
    eps_key: str
    defaults: Mapping[str, Mapping[str, Any]]
    embedding: str
    final_norm: str
    head: str
    shape_of: Callable[[Mapping[str, Any], str], ModelShape]
    positions: str = ""
    dropout: str = ""

    def layer_tensors(self, shape: ModelShape, layer: int) -> dict[str, tuple[str, Dims]]:
        """Return role -> (tensor name, shape) of every tensor of one layer.

        Roles are ``q_proj.weight``, ``q_proj.bias``, ``attn_norm.weight`` and so on.
        """
        prefix = self.layer.format(i=layer)
        form = dense_form(shape, shape.kind_of[layer])
        kind = shape.kind(form)
        tensors: dict[str, tuple[str, Dims]] = {}
        for linear in kind.linears:
            name = f"{prefix}.{self.linears[linear.role]}"
            out_dim, in_dim = linear_dims(shape, form, linear.role)
            tensors[f"{linear.role}.weight"] = (f"{name}.weight", (out_dim, in_dim))
            if linear.bias:
                tensors[f"{linear.role}.bias"] = (f"{name}.bias", (out_dim,))
        for norm in kind.norms:
            name = f"{prefix}.{self.norms[norm.role]}"
            for part in _parts(norm):
                dims = (width_at(shape, form, norm.over),)
                tensors[f"{norm.role}.{part}"] = (f"{name}.{part}", dims)
        return tensors

    def shared_tensors(self, form: ModelForm) -> dict[str, str]:
        """Return the name of each tensor that a layer takes from another -> that it is stored by.

        Both are full names; a matrix that is taken stands below its linear as ``source``.
        """
        found = {}
        for index, layer in enumerate(form.layers):
            for role, link in layer.links.items():
                name = self.linears[role]
                stored = f"{self.layer.format(i=link.layer)}.{name}"
                for part in link.parts:
                    below = "" if part == SOURCE else f".{part}"
                    taken = f"{self.layer.format(i=index)}.{name}.{part}.weight"
                    found[taken] = f"{stored}{below}.weight"
        return found

    @property
    def norm_bias(self) -> str:
        """The tensor of the final norm's bias, in families whose norms have one."""
        return self.final_norm.removesuffix("weight") + "bias"

    @property
    def head_shortcut(self) -> str:
        """The tensor that compression adds between the final norm and a tied head."""
        return self.final_norm.removesuffix("weight") + "shortcut.weight"

    @property
    def head_bias(self) -> str:
        """The tensor of the head's bias, in families whose head has one."""
        return self.head.removesuffix("weight") + "bias"

    def norm_tensors(self, shape: ModelShape) -> tuple[str, ...]:
        """Return the tensors of the final norm."""
        norm = shape.final_norm
        return (self.final_norm,) * norm.scale + (self.norm_bias,) * norm.bias

    def with_base(self, name: str) -> str:
        """Return the full name of a tensor of a model that was saved without its head."""
        whole = f"{self.base}.{name}"
        outer = (self.embedding, self.final_norm, self.norm_bias, *filter(None, [self.positions]))
        return whole if whole.startswith((*outer, self.layer.partition("{")[0])) else name

    def below_layer(self, role: str) -> str:
        """Return the name of a role below its layer, including roles that compression adds."""
        part, dot, rest = role.partition(".")
        return f"{self._names().get(part, part)}{dot}{rest}"

    def role_of(self, name: str) -> str:
        """Return the role of a name below its layer; the inverse of `below_layer`."""
        for part, below in self._names().items():
            if name == below or name.startswith(f"{below}."):
                return part + name[len(below) :]
        return name

    def head_among(self, names: Container[str]) -> str:
        """Return the name of the head's tensor in a checkpoint: the embedding's if tied."""
        return self.head if self.head in names else self.embedding

    def outer_tensors(self, shape: ModelShape) -> dict[str, tuple[str, Dims]]:
        """Return role -> (tensor name, shape) of the tensors outside the layers."""
        table = (shape.vocab_size, shape.hidden)
        tensors: dict[str, tuple[str, Dims]] = {"embedding": (self.embedding, table)}
        if shape.positions:
            tensors["positions"] = (self.positions, (shape.positions, shape.hidden))
        for part in _parts(shape.final_norm):
            name = self.final_norm if part == "weight" else self.norm_bias
            tensors["final_norm" if part == "weight" else "final_norm.bias"] = (
                name,
                (shape.hidden,),
            )
        if not shape.tied:
            tensors["head"] = (self.head, table)
        if shape.head_bias:
            tensors["head.bias"] = (self.head_bias, (shape.vocab_size,))
        return tensors

    def layout(self, shape: ModelShape) -> dict[str, Any]:
        """Return the names and facts that the code of a result needs beside its widths."""
        kinds = [
            {
                "linears": {each.role: [each.reads, each.writes] for each in kind.linears},
                "norms": {norm.role: norm.over for norm in kind.norms},
                "parallel": kind.parallel,
                "rotary": kind.rotary,
                "pairs": kind.pairs,
                "residual_scale": kind.residual_scale,
            }
            for kind in shape.kinds
        ]
        return {
            "layers": self.layer.removesuffix(".{i}"),
            "embedding": self.embedding.removesuffix(".weight"),
            "positions": self.positions.removesuffix(".weight"),
            "final_norm": self.final_norm.removesuffix(".weight"),
            "head": self.head.removesuffix(".weight"),
            "attention": self.attention,
            "activation": self.activation,
            "activation_key": self.activation_key,
            "dropout": self.dropout,
            "linears": dict(self.linears),
            "norms": dict(self.norms),
            "hidden": shape.hidden,
            "heads": shape.num_heads,
            "kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "kinds": kinds,
        }

    def _names(self) -> dict[str, str]:
        return {**self.linears, **self.norms, "rope_pairs": f"{self.attention}.rope_pairs"}


def _parts(norm: Norm) -> Iterator[str]:
    if norm.scale:
        yield "weight"
    if norm.bias:
        yield "bias"
