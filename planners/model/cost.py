"""Parameters, bytes and floating point operations, from integers alone."""

from collections.abc import Sequence
from dataclasses import replace

from planners.model.form import LayerForm, ModelForm, Start, dense_form
from planners.model.packing import packed_elements
from planners.model.shape import LINEARS, ModelShape
from planners.model.taps import Statistic

BYTES_OF = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def linear_dims(shape: ModelShape, form: LayerForm, name: str) -> tuple[int, int]:
    """Return (out, in) of one linear of a compressed layer, as if it were one matrix."""
    q = shape.num_heads * form.qk_head_dim
    k = shape.num_kv_heads * form.qk_head_dim
    v = shape.num_kv_heads * form.vo_head_dim
    return {
        "q_proj": (q, form.residual_in),
        "k_proj": (k, form.residual_in),
        "v_proj": (v, form.residual_in),
        "o_proj": (form.residual_mid, shape.num_heads * form.vo_head_dim),
        "gate_proj": (form.intermediate, form.residual_mid),
        "up_proj": (form.intermediate, form.residual_mid),
        "down_proj": (form.residual_out, form.intermediate),
    }[name]


def has_bias(shape: ModelShape, form: LayerForm, name: str) -> bool:
    """Return whether that linear of a compressed layer stores a bias."""
    if name == "o_proj":
        return form.o_bias
    return form.v_bias if name == "v_proj" else shape.has_bias(name)


def linear_weights(shape: ModelShape, form: LayerForm, name: str) -> int:
    """Return the elements of one linear's matrix, or of both its factors."""
    out_dim, in_dim = linear_dims(shape, form, name)
    rank = form.ranks.get(name)
    return out_dim * in_dim if rank is None else rank * (out_dim + in_dim)


def linear_parameters(shape: ModelShape, form: LayerForm, name: str) -> int:
    """Return the elements stored for one linear, its bias included."""
    out_dim, _ = linear_dims(shape, form, name)
    bias = out_dim if has_bias(shape, form, name) else 0
    return linear_weights(shape, form, name) + bias


def layer_parameters(shape: ModelShape, form: LayerForm) -> int:
    """Return the elements stored for one layer in that form."""
    total = sum(linear_parameters(shape, form, name) for name in LINEARS)
    total += _shortcut_parameters(form)
    if form.norm_weights:
        total += form.residual_in + form.residual_mid
    return total


def _shortcut_parameters(form: LayerForm) -> int:
    if not form.shortcuts:
        return 0
    return form.residual_mid * (form.residual_in + form.residual_out)


def model_parameters(shape: ModelShape, form: ModelForm) -> int:
    """Return the distinct elements stored for the whole model; a tied head counts once."""
    table = shape.vocab_size * form.embedding_dim
    head = 0 if form.tied else shape.vocab_size * form.head_dim
    norm = form.head_dim if form.head_norm_weight else 0
    return table + head + norm + sum(layer_parameters(shape, layer) for layer in form.layers)


def dense_model_form(shape: ModelShape) -> ModelForm:
    """Return the form of the uncompressed model."""
    return ModelForm(
        layers=(dense_form(shape),) * shape.num_layers,
        embedding_dim=shape.hidden,
        head_dim=shape.hidden,
        head_norm_weight=True,
        tied=shape.tied,
        native=True,
    )


def dense_parameters(shape: ModelShape) -> int:
    """Return the distinct elements of the input checkpoint; a tied tensor counts once."""
    return model_parameters(shape, dense_model_form(shape))


def dense_start(shape: ModelShape) -> Start:
    """Return the start of the first step of a run: the input model."""
    return Start(form=dense_model_form(shape), parameters_before=dense_parameters(shape))


def tap_dim(shape: ModelShape, tap: str, form: LayerForm | None = None) -> int:
    """Return the width of the activations at a tap of a layer; an uncompressed one if None."""
    layer = form or dense_form(shape)
    return {
        "attn_in": layer.residual_in,
        "resid_attn": layer.residual_in,
        "mlp_in": layer.residual_mid,
        "resid_mlp": layer.residual_mid,
        "resid_out": layer.residual_out,
        "o_in": shape.num_heads * layer.vo_head_dim,
        "mlp_hidden": layer.intermediate,
        "q_rope": shape.num_heads * layer.qk_head_dim,
        "k_rope": shape.num_kv_heads * layer.qk_head_dim,
        "v": shape.num_kv_heads * layer.vo_head_dim,
    }[tap]


def statistic_elements(
    shape: ModelShape, statistic: Statistic, form: LayerForm | None = None
) -> int:
    """Return the numbers that one statistic of a layer holds; grams are packed.

    Without a ``form``, of a layer that nothing touched.
    """
    layer = form or dense_form(shape)
    dim = tap_dim(shape, statistic.tap, layer)
    return statistic.row.elements(dim, layer, statistic.probe_tokens)


def linears_before(tap: str) -> tuple[str, ...]:
    """Return the linears that a layer's forward pass applies before a tap."""
    count = {"q_rope": 3, "k_rope": 3, "v": 3, "o_in": 3, "resid_mlp": 4, "mlp_in": 4,
             "mlp_hidden": 6, "resid_out": 7}  # fmt: skip
    return LINEARS[: count.get(tap, 0)]


def forward_flops(
    shape: ModelShape,
    *,
    tokens: int,
    sequence_length: int,
    form: ModelForm | None = None,
    last: Sequence[str] = LINEARS,
) -> int:
    """Return multiply-adds times two of the layers' forward pass, causal attention included.

    ``last`` are the linears of the last layer that are computed, if its output is not needed.
    """
    total = 0
    layers = (form or dense_model_form(shape)).layers
    for index, layer in enumerate(layers):
        names = last if index == len(layers) - 1 else LINEARS
        weights = sum(linear_weights(shape, layer, name) for name in names)
        heads = shape.num_heads * (layer.qk_head_dim + layer.vo_head_dim)
        total += weights + _shortcut_parameters(layer) + heads * (sequence_length // 2)
    return 2 * tokens * total


def gram_flops(
    shape: ModelShape,
    statistics: frozenset[Statistic],
    *,
    tokens: int,
    form: ModelForm | None = None,
) -> int:
    """Return multiply-adds times two of the grams of all layers, of which half is computed."""
    per_token = 0
    for layer in (form or dense_model_form(shape)).layers:
        for statistic in statistics:
            dim = tap_dim(shape, statistic.tap, layer)
            whole = dim * statistic.row.columns(dim, layer)
            per_token += packed_elements(dim) if statistic.row.packed else whole
    return 2 * tokens * per_token


def widest_layer(form: ModelForm) -> LayerForm:
    """Return a layer with the largest of each width in a model, and the ranks all layers have."""
    layers = form.layers
    first = layers[0]
    shared = [name for name in first.ranks if all(name in layer.ranks for layer in layers)]
    return replace(
        first,
        residual_in=max(layer.residual_in for layer in layers),
        residual_mid=max(layer.residual_mid for layer in layers),
        residual_out=max(layer.residual_out for layer in layers),
        intermediate=max(layer.intermediate for layer in layers),
        qk_head_dim=max(layer.qk_head_dim for layer in layers),
        vo_head_dim=max(layer.vo_head_dim for layer in layers),
        ranks={name: max(layer.ranks[name] for layer in layers) for name in shared},
        shortcuts=any(layer.shortcuts for layer in layers),
    )
