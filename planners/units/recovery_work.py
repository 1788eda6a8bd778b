"""The work of training a compressed model: forward, backward, steps of the optimiser."""

from dataclasses import replace

from planners.batching import TokenBatching
from planners.model.cost import (
    BYTES_OF,
    dense_model_form,
    layer_parameters,
    model_parameters,
)
from planners.model.form import LayerForm, ModelForm, dense_form
from planners.model.shape import ModelShape
from planners.recovery import MEASURES, Recovery
from planners.units.work import CALL, Work, layer_forward, loss_work

TRAINING = 3  # forward passes that a forward and a backward pass take
STEP_BYTES = 36  # moved for a parameter in a step: weight, gradients, two moments
LOGITS = 4  # times the work of a loss: two models, and the gradient of one


def passing(shape: ModelShape, form: LayerForm, data: TokenBatching, *, tokens: int) -> Work:
    """Return the work of passing tokens from file to file through one layer."""
    moved = tokens * shape.hidden * BYTES_OF[data.dtype]
    weights = layer_parameters(shape, form) * BYTES_OF[shape.dtype]
    files = Work(read=moved + weights, written=moved)
    return CALL + files + layer_forward(shape, form, tokens=tokens, data=data)


def layer_training(shape: ModelShape, form: LayerForm, data: TokenBatching, how: Recovery) -> Work:
    """Return the work of training one layer to the outputs of another."""
    trained, measured = _tokens(how)
    forward = layer_forward(shape, form, tokens=1, data=_of_text(data, how))
    count = layer_parameters(shape, form)
    moved = 2 * how.data_tokens * shape.hidden * BYTES_OF[data.dtype]
    compared = Work(touched=16 * shape.hidden).times(trained + measured)
    return (
        CALL
        + Work(read=moved, touched=STEP_BYTES * count * how.all_steps)
        + forward.times(TRAINING * trained + measured)
        + compared
    )


def model_training(
    shape: ModelShape,
    form: ModelForm,
    dense: ModelShape,
    data: TokenBatching,
    how: Recovery,
    *,
    divided: bool,
) -> Work:
    """Return the work of training a whole model to the logits of another.

    If its layers are divided over workers, each is passed once more for its gradients.
    """
    trained, measured = _tokens(how)
    text = _of_text(data, how)
    student = sum((layer_forward(shape, f, tokens=1, data=text) for f in form.layers), Work())
    kinds = (dense_form(dense, kind) for kind in dense.kind_of)
    teacher = sum((layer_forward(dense, f, tokens=1, data=text) for f in kinds), Work())
    logits = loss_work(shape, form.head_reads, tokens=1).times(LOGITS)
    count = model_parameters(shape, form)
    return (
        CALL
        + Work(
            read=(count + model_parameters(dense, dense_model_form(dense))) * BYTES_OF[shape.dtype]
        )
        + Work(touched=STEP_BYTES * count * how.all_steps)
        + student.times((TRAINING + divided) * trained + measured)
        + (teacher + logits).times(trained + measured)
    )


def _tokens(how: Recovery) -> tuple[int, int]:
    """Return the tokens that are trained on, trials included, and those that losses are of."""
    held = how.held_out * how.length
    measures = 1 + MEASURES + (len(how.rates) if how.trial_steps else 0)
    return how.all_steps * how.batch * how.length, measures * held


def _of_text(data: TokenBatching, how: Recovery) -> TokenBatching:
    return replace(data, sequences=how.sequences, sequence_length=how.length)
