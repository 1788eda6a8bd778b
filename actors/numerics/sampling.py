"""Draw the next tokens of sequences, by random numbers that are known beforehand.

The sums are of integers, so a token depends on the logits of its sequence alone: not on the other
sequences of a batch, and not on the order in which a device adds.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planners.errors import NumericsError

UNIT = 2.0**40  # the weight of the most likely token; 4 million of them do not overflow 63 bits
BITS = 64


def random_bits(seed: int, sequence: int, position: int) -> int:
    """Return 64 random bits that these three numbers determine, on every machine."""
    digest = hashlib.sha256(f"{seed} {sequence} {position}".encode()).digest()
    return int.from_bytes(digest[: BITS // 8], "little")


def drawn(
    logits: Float[Tensor, "batch vocab"], *, seed: int, sequences: Sequence[int], position: int
) -> Int[Tensor, " batch"]:
    """Return a token for each row, of the probability that softmax gives it (temperature 1).

    A token that is 2^40 times less likely than the most likely one is never drawn.

    Args:
        logits: of the token at ``position``.
        seed: of the random numbers.
        sequences: the number of each row's sequence.
        position: of the token in its sequence, from 0.

    Raises:
        NumericsError: a row has NaN or infinity, or nothing else than minus infinity.
    """
    largest = logits.amax(-1, keepdim=True)  # NaN if one of them is
    broken = (~largest.isfinite()).flatten().nonzero().flatten().tolist()
    if broken:
        raise NumericsError(
            f"the logits of token {position} of sequence {sequences[broken[0]]} are not finite"
        )
    weights = ((logits.double() - largest.double()).exp() * UNIT).long()
    sums = weights.cumsum(-1)
    totals = sums[:, -1].tolist()
    thresholds = [
        random_bits(seed, sequence, position) * total >> BITS  # uniform in [0, total)
        for sequence, total in zip(sequences, totals, strict=True)
    ]
    wanted = torch.tensor(thresholds, device=logits.device)[:, None]
    return torch.searchsorted(sums, wanted, right=True)[:, 0]
