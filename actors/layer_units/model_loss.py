"""From the output of one layer to the model's loss: later layers are read one at a time."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from actors.modeling.outer_model import OuterModel
from actors.storage.checkpoint import Checkpoint
from planners.families import load as load_family


def downstream_losses(
    checkpoint: Checkpoint,
    layer: int,
    streams: Sequence[Tensor],
    *,
    ids: Int[Tensor, "sequences tokens"],
    device: str,
) -> list[float]:
    """Return the mean loss in nats of the next tokens for each of several outputs of a layer.

    All streams pass a layer before the next one is read, so one layer is in memory at a time.

    Args:
        checkpoint: the model.
        layer: whose outputs the streams are.
        streams: (sequences, tokens, hidden) each, in the dtype to compute in.
        ids: the tokens that they are of.
        device: where to compute.

    Raises:
        ModelError: a weight is missing or not finite.
    """
    shape, dtype = checkpoint.shape, streams[0].dtype
    family = load_family(shape.family)
    outer = OuterModel(checkpoint.config, family, dtype=dtype, device=device)
    passing = list(streams)
    arguments = outer.layer_arguments(passing[0])
    for index in range(layer + 1, shape.num_layers):
        prefix = family.layer.format(i=index) + "."
        module = outer.layer(index, checkpoint.read_prefix(prefix))
        for number, hidden in enumerate(passing):
            passing[number] = module(hidden, **arguments[index])
        del module  # before the next one is read
    outer.read_head(checkpoint)
    summed = [outer.loss(hidden, ids) for hidden in passing]
    return [nats / num_predicted for nats, num_predicted in summed]
