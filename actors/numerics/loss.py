"""Negative log likelihood as a sum and a count."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def summed_nll(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> float:
    """Return the sum of -log p(target) in nats, each token in float32, summed in float64."""
    each = torch.nn.functional.cross_entropy(logits.to(torch.float32), targets, reduction="none")
    return float(each.to(torch.float64).sum())
