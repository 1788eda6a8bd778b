"""Widths and ranks of a compressed model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from planners.model.layer import ROLES
from planners.model.scheme import Scheme, scheme_from_json
from planners.model.shape import ModelShape

SOURCE = "source"  # the matrix of another layer to which a linear adds its own two factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a linear takes from the same linear of another layer, where it is stored.

    Attributes:
        layer: that stores it, an earlier one.
        parts: ``source``, the matrix of a linear that is stored whole, or one or both of the
            factors ``first`` and ``second``.
        fitted: the source is multiplied by a number that is stored.
    """

    layer: int
    parts: tuple[str, ...]
    fitted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """The widths of one layer after compression, from which the shipped modeling file is built.

    An uncompressed layer has the model's own widths, no shortcuts, its norm weights and no
    ranks; see `dense_form`.

    Attributes:
        residual_in: width of the residual stream at the input.
        residual_mid: width between attention and MLP; 0 where both read the layer's input.
        residual_out: width at the output.
        shortcuts: the residual passes a matrix at each of the two additions (SliceGPT).
        norm_weights: the norms keep their scale; False where it was folded into the next weights.
        intermediate: inner width of the MLP.
        qk_head_dim: width of a query or key head; even, because rope pairs stay whole.
        vo_head_dim: width of a value head.
        biases: roles of the linears that store a bias: those of the input model, and others where
            the v bias or that of a norm has moved.
        kind: of the layer, as an index into the kinds of the model.
        ranks: linear -> rank, for those stored as two factors; of a linear with a source, of the
            change that is added to it.
        cores: linear -> rows of the matrix between its two factors, of which the second has so
            many columns; 0 where that matrix is diagonal.
        links: linear -> what it takes from another layer.
        pairs: the rope pairs that all heads keep, ascending; empty where each KV head has its own,
            or all.
        schemes: matrix (see `planners.model.cost.matrices`) -> how it is quantised.
    """

    residual_in: int
    residual_mid: int
    residual_out: int
    shortcuts: bool = False
    norm_weights: bool = True
    intermediate: int
    qk_head_dim: int
    vo_head_dim: int
    biases: tuple[str, ...] = ()
    kind: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    cores: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)
    pairs: tuple[int, ...] = ()
    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether each linear is one matrix of its own."""
        return not (self.ranks or self.links)

    @property
    def has_stock_heads(self) -> bool:
        """Whether its attention is a stock one of narrower heads, scaled by their width."""
        return bool(self.pairs) and self.qk_head_dim == self.vo_head_dim


def dense_form(shape: ModelShape, kind: int = 0) -> LayerForm:
    """Return the form of an uncompressed layer of a kind."""
    return LayerForm(
        residual_in=shape.hidden,
        residual_mid=0 if shape.kinds[kind].parallel else shape.hidden,
        residual_out=shape.hidden,
        intermediate=shape.intermediate,
        qk_head_dim=shape.head_dim,
        vo_head_dim=shape.head_dim,
        biases=shape.kinds[kind].biases,
        kind=kind,
    )


def with_biases(form: LayerForm, roles: Iterable[str]) -> LayerForm:
    """Return a layer whose linears of these roles store a bias, in the order of `ROLES`."""
    stored = set(roles)
    return replace(form, biases=tuple(role for role in ROLES if role in stored))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForm:
    """The widths of the whole compressed model.

    Attributes:
        layers: one form a layer.
        embedding_dim: columns of the embedding that are kept.
        head_dim: width of the residual stream that the head reads.
        head_norm_weight: the final norm keeps its scale and bias.
        tied: the head is still the embedding's tensor.
        native: a stock config of the input's own family expresses it.
        head_bias: the head has a bias.
        positions: a table of learned positions is added to the embedding.
        head_shortcut: a matrix after the final norm leads from the stream that the head reads to
            the basis of the embedding, whose table a tied head still is.
        tables: ``embedding`` or ``head`` -> how its matrix is quantised.
        dtype: of the tensors that are not quantised; empty where it is that of the input.
    """

    layers: tuple[LayerForm, ...]
    embedding_dim: int
    head_dim: int
    head_norm_weight: bool
    tied: bool
    native: bool
    head_bias: bool = False
    positions: bool = False
    head_shortcut: bool = False
    tables: Mapping[str, Scheme] = field(default_factory=dict)
    dtype: str = ""

    @property
    def shares(self) -> bool:
        """Whether layers take matrices from one another."""
        return any(layer.links for layer in self.layers)

    @property
    def is_quantised(self) -> bool:
        """Whether any matrix is."""
        return bool(self.tables) or any(layer.schemes for layer in self.layers)

    @property
    def head_reads(self) -> int:
        """Columns of the head's matrix."""
        return self.embedding_dim if self.head_shortcut else self.head_dim


def factor_owners(form: ModelForm) -> set[tuple[int, int]]:
    """Return (layer, layer that stores factors which it takes) of a model."""
    return {
        (index, link.layer)
        for index, layer in enumerate(form.layers)
        for link in layer.links.values()
        if SOURCE not in link.parts
    }


def site_dims(form: ModelForm) -> dict[int, int]:
    """Return site -> width: layer i has sites 2i and, between its blocks, 2i + 1; then the last."""
    dims = {2 * index: layer.residual_in for index, layer in enumerate(form.layers)}
    between = {2 * i + 1: each.residual_mid for i, each in enumerate(form.layers)}
    dims |= {site: dim for site, dim in between.items() if dim}
    return dict(sorted(dims.items())) | {2 * len(form.layers): form.layers[-1].residual_out}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a step starts from: the model that the steps before it produced.

    Attributes:
        form: widths of the step's input model.
        parameters_before: distinct elements of the run's input model, to which every
            keep_fraction refers.
    """

    form: ModelForm
    parameters_before: int


def layer_form_from_json(data: Mapping[str, Any]) -> LayerForm:
    """Return the layer form that `to_json` wrote."""
    lists = {key: tuple(data[key]) for key in ("biases", "pairs") if key in data}
    links = {
        role: Link(**{**link, "parts": tuple(link["parts"])})
        for role, link in data.get("links", {}).items()
    }
    schemes = _schemes(data.get("schemes", {}))
    return LayerForm(**{**data, **lists, "links": links, "schemes": schemes})


def model_form_from_json(data: Mapping[str, Any]) -> ModelForm:
    """Return the model form that `to_json` wrote."""
    layers = tuple(layer_form_from_json(layer) for layer in data["layers"])
    return ModelForm(**{**data, "layers": layers, "tables": _schemes(data.get("tables", {}))})


def _schemes(data: Mapping[str, Any]) -> dict[str, Scheme]:
    return {name: scheme_from_json(each) for name, each in data.items()}
