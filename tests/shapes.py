"""Shapes of Llamas, for tests that need no checkpoint."""

from planners.budget.widths import layer_widths
from planners.model.cost import linear_dims
from planners.model.form import dense_form
from planners.model.layer import ATTENTION, ROLES, decoder_layer
from planners.model.shape import ModelShape


def llama_shape(*, qkv_bias=False, o_bias=False, mlp_bias=False, **integers):
    """Return the shape of a Llama with these biases."""
    biases = ATTENTION[:3] * qkv_bias + ATTENTION[3:] * o_bias + ROLES[4:] * mlp_bias
    layer = decoder_layer(rotary=integers["head_dim"], biases=frozenset(biases))
    return ModelShape(kinds=(layer,), native=("residual", "mlp", "heads"), **integers)


def dense_dims(shape, role):
    """Return (out, in) of a linear of the first layer of a model."""
    return linear_dims(shape, dense_form(shape), role)


def has_bias(shape, role):
    """Return whether a linear of the first layer of a model has a bias."""
    return role in shape.kinds[0].biases


def full_widths(shape):
    """Return module -> inner width before compression."""
    return layer_widths(dense_form(shape))


def steps(ffn):
    """Return module -> step of its width: this one of the FFN, and the finest of heads."""
    return {"mlp": ffn, "qk": 2, "vo": 1}
