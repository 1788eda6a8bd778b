"""Losses of training, each with its gradient: sums over tokens, so that parts of a batch add up.

The gradient is computed beside the sum, not by autograd, which would keep several matrices as large
as the logits until the backward pass.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST = 1e-30  # of a squared norm that is divided by


def divergence(
    logits: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """Return the sum of ``KL(teacher || student)`` in nats, and its gradient by ``logits``.

    ``sum_v p_v (log p_v - log q_v)`` with gradient ``q - p``, p the teacher's distribution of the
    next token and q the student's, both at temperature 1. Computed in float32, summed over tokens
    in float64.
    """
    log_p = torch.log_softmax(teacher.to(torch.float32), dim=-1)
    log_q = torch.log_softmax(logits.to(torch.float32), dim=-1)
    p = log_p.exp()
    nats = log_p.sub_(log_q).mul_(p).sum(-1)  # (tokens,)
    return nats.to(torch.float64).sum(), log_q.exp_().sub_(p)


def cross_entropy(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """Return the sum of ``-log q_label`` in nats, and its gradient by the logits.

    In float32, summed over tokens in float64.
    """
    log_q = torch.log_softmax(logits.to(torch.float32), dim=-1)
    at = labels[:, None]
    nats = -log_q.gather(1, at).to(torch.float64).sum()
    gradient = log_q.exp_()
    return nats, gradient.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32))


def squared_error(
    output: Float[Tensor, "tokens width"], target: Float[Tensor, "tokens width"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens width"]]:
    """Return the sum over tokens of ``|y - t|^2 / |t|^2``, and its gradient by the outputs y.

    In float32, summed over tokens in float64.
    """
    target = target.to(torch.float32)
    rest = output.to(torch.float32) - target
    energy = target.square().sum(-1, keepdim=True).clamp_min(SMALLEST)
    each = rest.square().sum(-1, keepdim=True) / energy
    return each.to(torch.float64).sum(), rest.mul_(2 / energy)
