"""Train a single layer to the outputs of the layer that it was made from, on that one's inputs."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actors.training.adapters import Adapters
from actors.training.course import Course
from actors.training.group import Alone
from actors.training.lessons import Lessons, Rows, Trained
from actors.training.losses import squared_error
from actors.training.resume import Durability, complete, found_for
from actors.training.trained import Tensors, linears_of, made
from planners.recovery import Recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerData:
    """What a layer learns.

    Attributes:
        forward: the layer's output, (sequences, tokens, width), from its input.
        inputs: the inputs of sequences given by their numbers.
        targets: likewise the outputs to be reached.
        num_sequences: how many there are; those that are held out are the last.
        length: tokens in each.
    """

    forward: Callable[[Tensor], Tensor]
    inputs: Callable[[Rows], Tensor]
    targets: Callable[[Rows], Tensor]
    num_sequences: int
    length: int


def train_layer(
    module: nn.Module,
    dense: Mapping[str, Tensor],
    data: LayerData,
    recovery: Recovery,
    durability: Durability,
    *,
    frozen: Container[str] = (),
) -> tuple[Course, dict[str, Tensor]]:
    """Train a layer; it is resumed from its newest checkpoint if there is one.

    Args:
        module: the layer that ``data.forward`` runs, in float32.
        dense: tensors of the layer that it was made from, by their names below the layer.
        data: inputs and targets.
        recovery: how it is trained.
        durability: when it is saved; the finished layer is left to the caller.
        frozen: names below the layer of the tensors that it shares with others, which must not
            change while those are trained.

    Returns:
        How it went; name below the layer -> value of the tensors that were trained: the best that
        were found, those of before if none is better. Empty if it was stopped, or none is trained.

    Raises:
        NumericsError: the loss is no number, or far above that at the start.
    """
    trained = trained_of(module, dense, recovery, frozen=frozen)
    if not trained.parameters:
        return Course(), {}
    group = Alone()
    found = found_for(durability.checkpoints, group.agreed)
    lessons = Lessons(_Outputs(data), trained, recovery, group, num_sequences=data.num_sequences)
    return complete(found, lessons, trained, recovery, durability)


def trained_of(
    module: nn.Module,
    dense: Mapping[str, Tensor],
    recovery: Recovery,
    *,
    frozen: Container[str] = (),
) -> Trained:
    """Return what of a layer is trained."""
    if recovery.trains == "lora":
        return Adapters(linears_of(module, frozen=frozen), recovery)
    if recovery.trains == "made":
        return Tensors(module, made(module, dense, frozen=frozen), recovery)
    names = [name for name, _ in module.named_parameters() if name not in frozen]
    return Tensors(module, names, recovery)


class _Outputs:
    """The relative squared error of a layer's outputs."""

    def __init__(self, data: LayerData) -> None:
        self._data, self.terms = data, data.length

    def backward(self, rows: Rows, scale: float) -> Tensor:
        output = self._output(rows)
        loss, gradient = self._loss(output.detach(), rows)
        torch.autograd.backward(output, gradient.mul_(scale).to(output.dtype))
        return loss

    @torch.no_grad()
    def loss(self, rows: Rows) -> Tensor:
        return self._loss(self._output(rows), rows)[0]

    def _output(self, rows: Rows) -> Tensor:
        return self._data.forward(self._data.inputs(rows)).flatten(0, 1)

    def _loss(self, output: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return squared_error(output, self._data.targets(rows).flatten(0, 1))
