"""Bytes that tasks read of an input model on the Hub, and how fast they arrive.

Workers keep no copy on disk, so each task that needs weights reads them again.
"""

from planners.model.cost import BYTES_OF, layer_parameters
from planners.model.form import dense_form
from planners.model.shape import ModelShape
from planners.plan import StagePlan
from planners.units.kinds import KINDS
from planners.units.units import Unit

# Bytes a second of one worker: assumed. It depends on the machine's network, the region and the
# time of day; a machine with 10 Gbit/s nominally has five times that.
FROM_HUB = 0.25e9


def layers_bytes(shape: ModelShape, first: int, last: int) -> int:
    """Return the bytes of the weights of layers first, ..., last - 1 of the input."""
    forms = (dense_form(shape, kind) for kind in shape.kind_of[first:last])
    return sum(layer_parameters(shape, form) for form in forms) * BYTES_OF[shape.dtype]


def table_bytes(shape: ModelShape) -> int:
    """Return the bytes of the embedding, or of the head."""
    return shape.vocab_size * shape.hidden * BYTES_OF[shape.dtype]


def stage_bytes(shape: ModelShape, stage: StagePlan) -> int:
    """Return the bytes read to load a stage of the input."""
    ends = int(stage.embedding) + int(stage.head)
    return layers_bytes(shape, stage.first, stage.last) + ends * table_bytes(shape)


def unit_bytes(shape: ModelShape, unit: Unit, *, to_the_end: bool = False) -> int:
    """Return the bytes that a unit reads of the input.

    Args:
        shape: of the input.
        unit: the unit.
        to_the_end: damage is measured on the model's loss, which needs all later layers.
    """
    reads = KINDS[unit.kind].reads
    if reads == "table":
        return 0 if unit.kind == "head" and shape.tied else table_bytes(shape)
    if reads != "layer":
        return 0
    if unit.kind == "damage" and to_the_end:
        return layers_bytes(shape, unit.index, shape.num_layers) + table_bytes(shape)
    return layers_bytes(shape, unit.index, unit.index + 1)
