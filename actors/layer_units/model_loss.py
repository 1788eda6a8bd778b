"""From the output of one layer to the model's loss: what is behind it is read a layer at a time."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from actors.modeling.build import Skeleton
from actors.numerics.loss import next_token_nll
from actors.storage.checkpoint import Checkpoint
from planners.families import load as load_family
from planners.memory.peaks import LOGIT_TOKENS


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
    shape, config = checkpoint.shape, checkpoint.config
    family, dtype = load_family(shape.family), streams[0].dtype
    passing = list(streams)
    for index in range(layer + 1, shape.num_layers):
        skeleton = Skeleton(config, dtype=dtype, device=device)
        prefix = family.layer.format(i=index) + "."
        module = skeleton.layer(index, checkpoint.read_prefix(prefix))
        angles = skeleton.angles(passing[0])
        for number, hidden in enumerate(passing):
            passing[number] = module(hidden, attention_mask=None, position_embeddings=angles)
    skeleton = Skeleton(config, dtype=dtype, device=device)
    norm = skeleton.final_norm(checkpoint.read_prefix(family.final_norm.removesuffix("weight")))
    table = family.head if family.head in checkpoint.locations else family.embedding
    head = checkpoint.read(table).to(device, dtype)
    found = []
    for hidden in passing:
        nats, num_predicted = next_token_nll(norm(hidden), head, ids, block=LOGIT_TOKENS)
        found.append(nats / num_predicted)
    return found
