"""What a compressed model learns from sequences: the dense model's logits, or the text itself."""

import torch
from torch import Tensor

from actors.devices.transfer import to_host
from actors.training.lessons import Rows
from actors.training.losses import cross_entropy, divergence
from actors.training.whole_model import WholeModel
from planners.memory.peaks import LOGIT_TOKENS


class Distillation:
    """Logits of `LOGIT_TOKENS` tokens at a time are in memory, of student and teacher.

    Attributes:
        terms: predictions of a sequence; the text does not say what follows its last token.
    """

    def __init__(self, student: WholeModel, teacher: WholeModel | None, ids: Tensor) -> None:
        """Learn from a teacher, or without one from the tokens, (sequences, tokens)."""
        self._student, self._teacher, self._ids = student, teacher, ids
        self.terms = ids.shape[1] - (teacher is None)
        # What the teacher's head reads is the same each time held-out sequences are measured.
        self._known: dict[tuple[int, ...], Tensor] = {}

    def backward(self, rows: Rows, scale: float) -> Tensor:
        """Return the summed loss of sequences; add its gradient times ``scale`` to the weights'.

        The backward pass of each chunk of logits ends at the hidden states; that of the model
        begins there, once for all chunks.
        """
        targets = torch.split(self._targets(rows), LOGIT_TOKENS)
        hidden = self._flat(self._student.hidden(self._ids[list(rows)]))
        leaves = [each.requires_grad_() for each in torch.split(hidden.detach(), LOGIT_TOKENS)]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for leaf, target in zip(leaves, targets, strict=True):
            total += self._backward(leaf, target, scale)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        torch.autograd.backward(hidden, torch.cat(gradients))
        return total

    def _backward(self, leaf: Tensor, target: Tensor, scale: float) -> Tensor:
        """Return the loss of a chunk, whose logits are gone when it returns."""
        logits = self._student.logits(leaf)
        loss, gradient = self._loss(logits.detach(), target)
        torch.autograd.backward(logits, gradient.mul_(scale).to(logits.dtype))
        return loss

    @torch.no_grad()
    def loss(self, rows: Rows) -> Tensor:
        """Return the summed loss of sequences that are measured again and again."""
        key = tuple(rows)
        if key not in self._known:
            self._known[key] = to_host(self._targets(rows))
        hidden = self._flat(self._student.hidden(self._ids[list(rows)]))
        targets = self._known[key].to(hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        pairs = zip(*(torch.split(each, LOGIT_TOKENS) for each in (hidden, targets)), strict=True)
        for chunk, target in pairs:
            total += self._loss(self._student.logits(chunk), target)[0]
        return total

    @torch.no_grad()
    def _targets(self, rows: Rows) -> Tensor:
        """Return what the teacher's head reads, (tokens, width), or the tokens that follow."""
        ids = self._ids[list(rows)]
        if self._teacher is None:
            return ids[:, 1:].flatten()
        return self._flat(self._teacher.hidden(ids))

    def _flat(self, hidden: Tensor) -> Tensor:
        """Return the tokens that predict, (tokens, width)."""
        return hidden[:, : self.terms].flatten(0, 1)

    @torch.no_grad()
    def _loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self._teacher is None:
            return cross_entropy(logits, target.to(logits.device))
        return divergence(logits, self._teacher.logits(target))
