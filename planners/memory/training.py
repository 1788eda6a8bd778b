"""Peak memory of training a compressed model, buffer by buffer.

Weights, gradients, moments and losses are in float32; what is kept of a forward pass for the
backward pass is counted by the inputs of linears, norms and attention.
"""

from planners.memory.peaks import DOUBLE, LOGIT_TOKENS, SINGLE, Shrinking
from planners.model.cost import (
    BYTES_OF,
    dense_model_form,
    held_parameters,
    layer_parameters,
    matrices,
    model_parameters,
)
from planners.model.form import LayerForm, ModelForm
from planners.model.layer import ATTENTION
from planners.model.shape import ModelShape
from planners.recovery import SHARDS, Recovery

MOMENTS_AND_BEST = 3  # copies of what is trained beside itself
OF_A_STEP = 4  # copies of the largest tensor, while the optimiser changes it
LOGITS = {"kl": 5, "labels": 3}  # student, teacher, their logarithms, the gradient
RESIDUALS = 5.5  # of a layer: what its norms and linears read
# Copies of a layer while a divided one is gathered, and of its gradients while workers add theirs.
GATHERED, REDUCED = 3, 3
NARROW = 0.71  # what is kept of a pass in 16 bits, to that in 32: norms and losses stay in 32


def inputs_unit(step: Shrinking) -> int:
    """Return the peak of passing a shard of the recovery's text through a layer of the input."""
    how = step.recovery
    if how is None or how.mode != "local":
        return 0
    shard = -(-how.data_tokens // SHARDS) * step.shape.hidden * BYTES_OF[step.dtype]
    # What was computed of it so far, and then all of it in one piece.
    return 2 * shard + max(step.cells(b) + step.passing(b) for b, _ in step.layers)


def layer_unit(step: Shrinking) -> int:
    """Return the peak of training one layer to the outputs of another."""
    how = step.recovery
    if how is None or how.mode != "local":
        return 0
    return max(
        _layer(step.shape, before, after, how, dtype=step.dtype) for before, after in step.layers
    )


def model_parts(
    shape: ModelShape,
    form: ModelForm,
    dense: ModelShape,
    how: Recovery,
    *,
    dtype: str,
    workers: int = 1,
) -> dict[str, int]:
    """Return what is in the peak of one worker that trains a whole model, in bytes by kind.

    Args:
        shape: of the compressed model.
        form: its widths.
        dense: of the model whose logits it learns.
        how: it is trained.
        dtype: of the products, and of the dense model.
        workers: over which the layers are divided.
    """
    if workers > 1:
        return _divided_parts(shape, form, dense, how, dtype=dtype, workers=workers)
    count, narrow = model_parameters(shape, form), BYTES_OF[dtype] < SINGLE
    trained = SINGLE * sum(trained_elements(shape, layer, how) for layer in form.layers)
    gradient = trained  # each part's is added to the sum of those before
    largest = SINGLE * max(_largest(shape, layer, how) for layer in form.layers)
    tokens = part_tokens(how)
    kept = sum(kept_elements(shape, layer) for layer in form.layers) * tokens * SINGLE
    if how.replace != "none":  # in some steps most layers may be the teacher's
        whole = dense_model_form(dense).layers
        kept = max(kept, sum(kept_elements(dense, layer) for layer in whole) * tokens * SINGLE)
    streams = tokens * max(form.head_dim, dense.hidden) * (3 * SINGLE + BYTES_OF[dtype])
    logits = LOGITS[how.loss] * min(tokens, LOGIT_TOKENS) * shape.vocab_size * SINGLE
    activations = int(kept * (NARROW if narrow else 1)) + streams
    teacher = 0
    if how.loss == "kl":
        teacher = model_parameters(dense, dense_model_form(dense)) * BYTES_OF[dtype]
        teacher += how.held_out * how.length * dense.hidden * BYTES_OF[dtype]
    merged = sum(_merged(shape, layer, how) for layer in form.layers)
    # The gradients of another part replace what its pass has kept, and a step comes after both.
    later = max(gradient, OF_A_STEP * largest, merged) - logits - activations
    return {
        "weights": count * SINGLE + (count * BYTES_OF[dtype] if narrow else 0),
        "gradients": gradient + max(later, 0),
        "moments": MOMENTS_AND_BEST * trained,
        "logits": logits,
        "activations": activations,
        "teacher": teacher,
    }


def _divided_parts(
    shape: ModelShape,
    form: ModelForm,
    dense: ModelShape,
    how: Recovery,
    *,
    dtype: str,
    workers: int,
) -> dict[str, int]:
    """Return the same of one of several workers, over whom the layers are divided."""
    layers = [layer_parameters(shape, layer) for layer in form.layers]
    outside = model_parameters(shape, form) - sum(layers)
    adapted = how.trains == "lora"  # each worker holds all adapters
    trained = [trained_elements(shape, layer, how) for layer in form.layers]
    own = SINGLE * -(-sum(trained) // (1 if adapted else workers))
    widest = SINGLE * max(layers)
    tokens, width = part_tokens(how), max(layer.residual_in for layer in form.layers)
    kept = max(kept_elements(shape, layer) for layer in form.layers) + len(layers) * width
    streams = tokens * max(form.head_dim, dense.hidden) * (3 * SINGLE + BYTES_OF[dtype])
    logits = LOGITS[how.loss] * min(tokens, LOGIT_TOKENS) * shape.vocab_size * SINGLE
    teacher = 0
    if how.loss == "kl":
        whole = dense_model_form(dense)
        inside = sum(layer_parameters(dense, layer) for layer in whole.layers)
        teacher = model_parameters(dense, whole) - inside - (-inside // workers)
        teacher += how.held_out * how.length * dense.hidden
        teacher *= BYTES_OF[dtype]
    gathered = GATHERED * widest
    # Those of the rounds before, and those that are added to them.
    gradients = own * min(2, how.parts // workers)
    if not adapted:
        gradients += REDUCED * SINGLE * max(trained)
    activations = kept * tokens * SINGLE + streams
    # At the end the weights with the adapters added replace what a pass has kept.
    merged = SINGLE * sum(layers) // workers if adapted else 0
    activations += max(merged - gathered - activations - logits, 0)
    return {
        "weights": SINGLE * (outside - (-sum(layers) // workers)),
        "gathered": gathered,
        "gradients": gradients,
        "moments": MOMENTS_AND_BEST * own,
        "logits": logits,
        "activations": activations,
        "teacher": teacher,
    }


def trained_elements(shape: ModelShape, form: LayerForm, how: Recovery) -> int:
    """Return the elements of a layer that are trained, at most."""
    if how.trains != "lora":
        return layer_parameters(shape, form)
    return how.rank * sum(out + inner for out, inner in matrices(shape, form).values())


def kept_elements(shape: ModelShape, form: LayerForm) -> int:
    """Return what a layer keeps of each token for the backward pass."""
    mlp = len(shape.kind(form).roles) - len(ATTENTION)
    wide = max(form.qk_head_dim, form.vo_head_dim)
    heads = shape.num_heads * (2 * wide + form.vo_head_dim) + shape.num_kv_heads * 2 * wide
    stream = int(RESIDUALS * max(form.residual_in, form.residual_out))
    return stream + heads + (mlp + 1) * form.intermediate + sum(form.ranks.values())


def part_tokens(how: Recovery) -> int:
    """Return the tokens that pass a model at one time."""
    return how.batch // how.parts * how.length


def _of_steps(trained: int, largest: int, passing: int) -> int:
    """Return what training needs beside weights: state, and the larger of a pass and a step."""
    gradient = trained * SINGLE
    state = MOMENTS_AND_BEST * gradient
    # The gradients of the parts before, while those of another one replace what a pass has kept.
    return state + gradient + max(passing, gradient, OF_A_STEP * largest * SINGLE)


def _layer(
    shape: ModelShape, before: LayerForm, after: LayerForm, how: Recovery, *, dtype: str
) -> int:
    tokens = part_tokens(how)
    weights = held_parameters(shape, after) * SINGLE
    dense = layer_parameters(shape, before) * BYTES_OF[shape.dtype]
    stored = layer_parameters(shape, after) * BYTES_OF[shape.dtype]
    # A batch of inputs and targets, as they are read and in the basis of the layer.
    streams = tokens * shape.hidden * (BYTES_OF[dtype] + 3 * SINGLE)
    bases = 0
    if after.residual_in < shape.hidden or after.shortcuts:
        bases = shape.hidden * (after.residual_in + after.residual_out) * (DOUBLE + SINGLE)
    trained, largest = trained_elements(shape, after, how), _largest(shape, after, how)
    passing = kept_elements(shape, after) * tokens * SINGLE + 2 * streams
    passing = max(passing, _merged(shape, after, how))
    return weights + dense + stored + bases + _of_steps(trained, largest, passing)


def _merged(shape: ModelShape, form: LayerForm, how: Recovery) -> int:
    """Return the bytes of weights with the adapters added, at the end; 0 without adapters."""
    return layer_parameters(shape, form) * SINGLE if how.trains == "lora" else 0


def _largest(shape: ModelShape, form: LayerForm, how: Recovery) -> int:
    if how.trains == "lora":
        return how.rank * max((max(dims) for dims in matrices(shape, form).values()), default=0)
    return max((out * inner for out, inner in matrices(shape, form).values()), default=0)
