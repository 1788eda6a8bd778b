"""Parameters, bytes and floating point operations, from integers alone."""

from planners.packing import packed_elements
from planners.plan import LINEARS, LayerForm, ModelForm, ModelShape, Statistic, dense_form

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


def linear_parameters(shape: ModelShape, form: LayerForm, name: str) -> int:
    """Return the elements stored for one linear, its bias included."""
    out_dim, in_dim = linear_dims(shape, form, name)
    rank = form.ranks.get(name)
    weight = out_dim * in_dim if rank is None else rank * (out_dim + in_dim)
    return weight + (out_dim if has_bias(shape, form, name) else 0)


def layer_parameters(shape: ModelShape, form: LayerForm) -> int:
    """Return the elements stored for one layer in that form."""
    total = sum(linear_parameters(shape, form, name) for name in LINEARS)
    if form.shortcuts:
        total += form.residual_mid * (form.residual_in + form.residual_out)
    if form.norm_weights:
        total += form.residual_in + form.residual_mid
    return total


def model_parameters(shape: ModelShape, form: ModelForm) -> int:
    """Return the distinct elements stored for the whole model; a tied head counts once."""
    table = shape.vocab_size * form.embedding_dim
    head = 0 if form.tied else shape.vocab_size * form.head_dim
    norm = form.head_dim if form.head_norm_weight else 0
    return table + head + norm + sum(layer_parameters(shape, layer) for layer in form.layers)


def dense_model_form(shape: ModelShape) -> ModelForm:
    """Return the form of the model that nothing touched."""
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


def tap_dim(shape: ModelShape, tap: str) -> int:
    """Return the width of the activations at a tap."""
    return {
        "o_in": shape.num_heads * shape.head_dim,
        "mlp_hidden": shape.intermediate,
        "q_rope": shape.num_heads * shape.head_dim,
        "k_rope": shape.num_kv_heads * shape.head_dim,
        "v": shape.num_kv_heads * shape.head_dim,
    }.get(tap, shape.hidden)


def statistic_elements(shape: ModelShape, statistic: Statistic) -> int:
    """Return the numbers that one statistic of one layer holds; grams are packed."""
    dim = tap_dim(shape, statistic.tap)
    if statistic.kind == "gram":
        return packed_elements(dim) + dim  # with the sum of x
    if statistic.kind == "normed_gram":
        return packed_elements(dim)
    if statistic.kind == "head_gram":
        return dim * shape.head_dim + dim
    if statistic.kind.startswith("probe"):
        return int(statistic.kind.removeprefix("probe")) * dim  # at most float64
    return dim // 2 if statistic.kind == "pair_energy" else 1


def forward_flops(shape: ModelShape, *, tokens: int, sequence_length: int) -> int:
    """Return multiply-adds times two of the layers' forward pass, causal attention included."""
    weights = sum(out * inner for out, inner in map(shape.linear_dims, LINEARS))
    attention = 2 * shape.num_heads * shape.head_dim * (sequence_length // 2)
    return 2 * shape.num_layers * tokens * (weights + attention)


def gram_flops(shape: ModelShape, statistics: frozenset[Statistic], *, tokens: int) -> int:
    """Return multiply-adds times two of the grams of all layers, of which half is computed."""
    per_token = 0
    for statistic in statistics:
        dim = tap_dim(shape, statistic.tap)
        if statistic.kind in ("gram", "normed_gram"):
            per_token += packed_elements(dim)
        elif statistic.kind == "head_gram":
            per_token += dim * shape.head_dim
    return 2 * shape.num_layers * tokens * per_token
