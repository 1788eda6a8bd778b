"""What the tensors of a model take as they are stored: bytes by kind, and bits of a weight."""

from planners.model.cost import (
    BYTES_OF,
    linear_bits,
    matrices,
    matrix_bytes,
    model_bytes,
    stored_width,
)
from planners.model.form import ModelForm
from planners.model.modules import LINEARS_OF
from planners.model.shape import ModelShape

EMBEDDING, HEAD, ATTENTION, MLP, REST = (
    "embedding",
    "head",
    "attention",
    "MLP",
    "norms and the rest",
)
FEW_BYTES = BYTES_OF["bfloat16"]  # of a number, in the dtypes in which models are served


def bytes_by_kind(shape: ModelShape, form: ModelForm) -> dict[str, int]:
    """Return kind -> the bytes of its tensors; together they are those of the whole model.

    A head that is the embedding's tensor takes none. Biases, norms, learned positions and matrices
    on the residual stream are the rest.
    """
    width = stored_width(shape, form)
    found = {
        kind: matrix_bytes((shape.vocab_size, reads), form.tables.get(kind), width)
        for kind, reads in table_widths(form).items()
    }
    found = {EMBEDDING: 0, HEAD: 0, ATTENTION: 0, MLP: 0, **found}
    for layer in form.layers:
        for name, dims in matrices(shape, layer).items():
            kind = MLP if name.partition(".")[0] in LINEARS_OF["mlp"] else ATTENTION
            found[kind] += matrix_bytes(dims, layer.schemes.get(name), width)
    return {**found, REST: model_bytes(shape, form) - sum(found.values())}


def table_widths(form: ModelForm) -> dict[str, int]:
    """Return embedding and, where it has a tensor of its own, head -> columns of its matrix."""
    head = {} if form.tied else {HEAD: form.head_reads}
    return {EMBEDDING: form.embedding_dim, **head}


def linear_weights_of(shape: ModelShape, form: ModelForm) -> int:
    """Return the elements of the matrices of all linears in the layers."""
    return sum(
        rows * width for layer in form.layers for rows, width in matrices(shape, layer).values()
    )


def bits_of_linears(shape: ModelShape, form: ModelForm) -> int:
    """Return the bits of all linears in the layers, scales included, without filling."""
    width = stored_width(shape, form)
    return sum(linear_bits(shape, layer, width=width) for layer in form.layers)


def bits_a_weight(shape: ModelShape, form: ModelForm) -> float:
    """Return the mean bits of a weight of the linears that are stored, scales included."""
    return bits_of_linears(shape, form) / linear_weights_of(shape, form)


def unquantised(shape: ModelShape, form: ModelForm) -> list[str]:
    """Return the kinds of tensors of a quantised model that are stored as plain numbers."""
    found = {kind: True for kind in table_widths(form) if kind not in form.tables}
    for layer in form.layers:
        for name in matrices(shape, layer):
            if name not in layer.schemes:
                kind = MLP if name.partition(".")[0] in LINEARS_OF["mlp"] else ATTENTION
                found[kind] = True
    return [*found, REST]
