"""Parameters, bytes and floating point operations, from integers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planners.model.form import SOURCE, LayerForm, ModelForm, Start, dense_form
from planners.model.packing import packed_elements
from planners.model.scheme import Scheme, nominal_bits, stored_bits
from planners.model.shape import ModelShape
from planners.model.statistic_kinds import TapDims
from planners.model.taps import Statistic

BYTES_OF = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def width_at(shape: ModelShape, form: LayerForm, place: str) -> int:
    """Return a width of a compressed layer, as `planners.model.layer.Linear` names it."""
    return {
        "residual_in": form.residual_in,
        "residual_mid": form.residual_mid,
        "residual_out": form.residual_out,
        "ffn": form.intermediate,
        "q": shape.num_heads * form.qk_head_dim,
        "k": shape.num_kv_heads * form.qk_head_dim,
        "v": shape.num_kv_heads * form.vo_head_dim,
        "o": shape.num_heads * form.vo_head_dim,
        "head": form.qk_head_dim,
    }[place]


def linear_dims(shape: ModelShape, form: LayerForm, role: str) -> tuple[int, int]:
    """Return (out, in) of one linear of a compressed layer, as if it were one matrix."""
    linear = shape.kind(form).linear(role)
    return width_at(shape, form, linear.writes), width_at(shape, form, linear.reads)


def factors(shape: ModelShape, form: LayerForm, role: str) -> dict[str, tuple[int, int]]:
    """Return part -> (out, in) of all matrices that a linear multiplies by, its own or another's.

    A linear that is stored whole has one, without a name; others have ``first`` and ``second``,
    with a ``core`` between them or beside a ``source``.
    """
    out_dim, in_dim = linear_dims(shape, form, role)
    rank, link = form.ranks.get(role), form.links.get(role)
    found = {}
    if link is not None and SOURCE in link.parts:
        found[SOURCE] = (out_dim, in_dim)
    elif rank is None:
        return {"": (out_dim, in_dim)}
    if rank:
        rows = form.cores.get(role) or rank
        found |= {"first": (rank, in_dim), "second": (out_dim, rows)}
        if form.cores.get(role):
            found["core"] = (rows, rank)
    return found


def extra_numbers(form: LayerForm, role: str) -> int:
    """Return the elements that a linear stores beside matrices and bias: factors of matrices."""
    link = form.links.get(role)
    diagonal = form.ranks[role] if form.cores.get(role) == 0 else 0
    return diagonal + (link is not None and link.fitted)


def linear_products(shape: ModelShape, form: LayerForm, name: str) -> int:
    """Return the multiply-adds of one linear for a token."""
    dims = factors(shape, form, name).values()
    return sum(rows * columns for rows, columns in dims) + extra_numbers(form, name)


def taken_weights(shape: ModelShape, form: LayerForm) -> int:
    """Return the elements that a layer takes from others, which a worker holds beside its own."""
    total = 0
    for role, link in form.links.items():
        found = factors(shape, form, role)
        total += sum(rows * columns for rows, columns in (found[part] for part in link.parts))
    return total


def linear_weights(shape: ModelShape, form: LayerForm, name: str) -> int:
    """Return the elements stored for one linear, without its bias."""
    own = _own(form, name, factors(shape, form, name))
    return sum(rows * columns for rows, columns in own.values()) + extra_numbers(form, name)


def matrices(shape: ModelShape, form: LayerForm) -> dict[str, tuple[int, int]]:
    """Return the matrices that a layer stores, (out, in): of each linear, or of its factors.

    A matrix is called like its linear, or ``q_proj.first`` and ``q_proj.second``.
    """
    return {
        f"{role}.{part}".removesuffix("."): dims
        for role in shape.kind(form).roles
        for part, dims in _own(form, role, factors(shape, form, role)).items()
    }


def _own(
    form: LayerForm, role: str, found: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    taken = form.links[role].parts if role in form.links else ()
    return {part: dims for part, dims in found.items() if part not in taken}


def matrix_bytes(dims: tuple[int, int], scheme: Scheme | None, width: int) -> int:
    """Return the bytes of a matrix as stored, ``width`` a number where it is not quantised."""
    if scheme is None:
        return dims[0] * dims[1] * width
    return -(-stored_bits(scheme, *dims) // 8)


def layer_bytes(shape: ModelShape, form: LayerForm, *, width: int) -> int:
    """Return the bytes of the tensors of a layer, ``width`` a number that is not quantised."""
    rest = layer_parameters(shape, form)
    total = 0
    if form.schemes:
        for name, dims in matrices(shape, form).items():
            rest -= dims[0] * dims[1]
            total += matrix_bytes(dims, form.schemes.get(name), width)
    return total + rest * width


def model_bytes(shape: ModelShape, form: ModelForm) -> int:
    """Return the bytes of all tensors as they are stored."""
    return outside_bytes(shape, form) + sum(
        layer_bytes(shape, layer, width=stored_width(shape, form)) for layer in form.layers
    )


def stored_width(shape: ModelShape, form: ModelForm) -> int:
    """Return the bytes of a number that is not quantised."""
    return BYTES_OF[form.dtype or shape.dtype]


def outside_bytes(shape: ModelShape, form: ModelForm) -> int:
    """Return the bytes of the tensors of all but the layers."""
    width, total = stored_width(shape, form), 0
    rest = model_parameters(shape, form)
    rest -= sum(layer_parameters(shape, layer) for layer in form.layers)
    for table, scheme in form.tables.items():
        reads = form.embedding_dim if table == "embedding" else form.head_reads
        dims = (shape.vocab_size, reads)
        rest -= dims[0] * dims[1]
        total += matrix_bytes(dims, scheme, width)
    return total + rest * width


def linear_bits(shape: ModelShape, form: LayerForm, *, width: int) -> int:
    """Return the bits of the linears of a layer, with scales, without any filling."""
    total = 0
    for name, dims in matrices(shape, form).items():
        scheme = form.schemes.get(name)
        total += nominal_bits(scheme, *dims) if scheme else dims[0] * dims[1] * width * 8
    return total


def linear_parameters(shape: ModelShape, form: LayerForm, name: str) -> int:
    """Return the elements stored for one linear, its bias included."""
    out_dim, _ = linear_dims(shape, form, name)
    bias = out_dim if name in form.biases else 0
    return linear_weights(shape, form, name) + bias


def held_parameters(shape: ModelShape, form: LayerForm) -> int:
    """Return the elements that a worker holds for one layer: its own, and those it takes."""
    return layer_parameters(shape, form) + taken_weights(shape, form)


def layer_parameters(shape: ModelShape, form: LayerForm) -> int:
    """Return the elements stored for one layer in that form."""
    kind = shape.kind(form)
    total = sum(linear_parameters(shape, form, role) for role in kind.roles)
    total += shortcut_parameters(form)
    for norm in kind.norms:
        if form.norm_weights or norm.over == "head":
            total += (norm.scale + norm.bias) * width_at(shape, form, norm.over)
    return total


def shortcut_parameters(form: LayerForm) -> int:
    """Return the elements of the matrices on the residual stream of a layer."""
    if not form.shortcuts:
        return 0
    if not form.residual_mid:
        return form.residual_in * form.residual_out
    return form.residual_mid * (form.residual_in + form.residual_out)


def model_parameters(shape: ModelShape, form: ModelForm) -> int:
    """Return the distinct elements stored for the whole model; a tied head counts once."""
    table = (shape.vocab_size + shape.positions) * form.embedding_dim
    head = 0 if form.tied else shape.vocab_size * form.head_reads
    head += shape.vocab_size if form.head_bias else 0
    head += form.embedding_dim * form.head_dim if form.head_shortcut else 0
    final = shape.final_norm
    norm = form.head_dim * (final.scale + final.bias) if form.head_norm_weight else 0
    return table + head + norm + sum(layer_parameters(shape, layer) for layer in form.layers)


def dense_model_form(shape: ModelShape) -> ModelForm:
    """Return the form of the uncompressed model."""
    return ModelForm(
        layers=tuple(dense_form(shape, kind) for kind in shape.kind_of),
        embedding_dim=shape.hidden,
        head_dim=shape.hidden,
        head_norm_weight=True,
        tied=shape.tied,
        head_bias=shape.head_bias,
        positions=shape.positions > 0,
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
        "mlp_in": width_at(shape, layer, shape.kind(layer).mlp_reads),
        "resid_mlp": width_at(shape, layer, shape.kind(layer).mlp_reads),
        "resid_out": layer.residual_out,
        "o_in": shape.num_heads * layer.vo_head_dim,
        "mlp_hidden": layer.intermediate,
        "q_rope": shape.num_heads * layer.qk_head_dim,
        "k_rope": shape.num_kv_heads * layer.qk_head_dim,
        "v": shape.num_kv_heads * layer.vo_head_dim,
    }[tap]


def tap_dims(shape: ModelShape, tap: str, form: LayerForm | None = None) -> TapDims:
    """Return the widths at a tap of a layer; of an uncompressed one if None."""
    layer = form or dense_form(shape)
    head = layer.qk_head_dim if tap in ("q_rope", "k_rope") else layer.vo_head_dim
    # A layer whose heads are narrower has rotated channels only if all of them were.
    rotary = min(shape.kind(layer).rotary, head)
    return TapDims(dim=tap_dim(shape, tap, layer), head=head, rotary=rotary)


def statistic_elements(
    shape: ModelShape, statistic: Statistic, form: LayerForm | None = None
) -> int:
    """Return the numbers that one statistic of a layer holds; grams are packed.

    Without a ``form``, of a layer that nothing touched.
    """
    at = tap_dims(shape, statistic.tap, form)
    return statistic.row.elements(at, statistic.probe_tokens)


def linears_before(shape: ModelShape, tap: str) -> tuple[str, ...]:
    """Return the linears that the last layer's forward pass applies before a tap."""
    roles = shape.kinds[shape.kind_of[-1]].roles
    qkv, attention = roles[:3], roles[:4]
    found = {"q_rope": qkv, "k_rope": qkv, "v": qkv, "o_in": qkv, "resid_mlp": attention,
             "mlp_in": attention, "mlp_hidden": roles[:-1], "resid_out": roles}  # fmt: skip
    return found.get(tap, ())


def forward_flops(
    shape: ModelShape,
    *,
    tokens: int,
    sequence_length: int,
    form: ModelForm | None = None,
    last: Sequence[str] | None = None,
) -> int:
    """Return multiply-adds times two of the layers' forward pass, causal attention included.

    ``last`` are the linears of the last layer that are computed, where its output is not needed.
    """
    total = 0
    layers = (form or dense_model_form(shape)).layers
    for index, layer in enumerate(layers):
        names = last if last is not None and index == len(layers) - 1 else shape.kind(layer).roles
        weights = sum(linear_products(shape, layer, name) for name in names)
        heads = shape.num_heads * (layer.qk_head_dim + layer.vo_head_dim)
        total += weights + shortcut_parameters(layer) + heads * (sequence_length // 2)
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
            at = tap_dims(shape, statistic.tap, layer)
            whole = at.dim * statistic.row.columns(at)
            per_token += packed_elements(at.dim) if statistic.row.packed else whole
    return 2 * tokens * per_token


def widest_layer(form: ModelForm) -> LayerForm:
    """Return a layer with the largest of each width in a model, and the ranks all layers have."""
    layers = form.layers
    first = layers[0]
    shared = [name for name in first.ranks if all(name in layer.ranks for layer in layers)]
    return replace(
        first,
        cores={name: rows for name, rows in first.cores.items() if name in shared},
        links={},
        residual_in=max(layer.residual_in for layer in layers),
        residual_mid=max(layer.residual_mid for layer in layers),
        residual_out=max(layer.residual_out for layer in layers),
        intermediate=max(layer.intermediate for layer in layers),
        qk_head_dim=max(layer.qk_head_dim for layer in layers),
        vo_head_dim=max(layer.vo_head_dim for layer in layers),
        ranks={name: max(layer.ranks[name] for layer in layers) for name in shared},
        shortcuts=any(layer.shortcuts for layer in layers),
    )
