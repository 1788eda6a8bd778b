"""Negative log likelihood as a sum and a count."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def summed_nll(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> float:
    """Return the sum of -log p(target) in nats, each token in float32, summed in float64."""
    each = torch.nn.functional.cross_entropy(logits.to(torch.float32), targets, reduction="none")
    return float(each.to(torch.float64).sum())


def next_token_nll(
    hidden: Float[Tensor, "batch tokens width"],
    logits: Callable[[Tensor], Tensor],
    ids: Int[Tensor, "batch tokens"],
    *,
    block: int,
) -> tuple[float, int]:
    """Return the summed nats of the next tokens and their number.

    ``logits`` is called for blocks of (tokens, width), and returns (tokens, vocab).
    """
    inputs = hidden[:, :-1].flatten(0, 1)  # (predicted, width)
    targets = ids[:, 1:].flatten().to(hidden.device)
    nats = 0.0
    for start in range(0, len(targets), block):
        part = slice(start, start + block)
        nats += summed_nll(logits(inputs[part]), targets[part])
    return nats, len(targets)
