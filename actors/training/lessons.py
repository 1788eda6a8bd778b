"""The gradients of steps and the held-out losses, whoever computes their parts.

A batch is cut into parts whose number the recipe sets; each worker computes as many, one after the
other. Whatever is summed over parts is summed in their order, so no bit depends on the workers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from actors.training.division import local
from actors.training.group import Group
from planners.errors import ConfigError
from planners.recovery import Place, Recovery

Rows = Sequence[int]  # sequences, by their number in the data
# Where a step stands -> a context for it, and whether a tensor takes no part in it.
Replaces = Callable[[Place], AbstractContextManager[Callable[[str], bool]]]


def nothing(place: Place) -> AbstractContextManager[Callable[[str], bool]]:
    """Let all tensors take part."""
    del place
    return nullcontext(lambda _: False)


class Source(Protocol):
    """What is to be learnt from sequences.

    Attributes:
        terms: that the loss sums for a sequence, one for each token it predicts.
    """

    terms: int

    def backward(self, rows: Rows, scale: float) -> Tensor:
        """Return the summed loss of sequences; add its gradient times ``scale`` to the weights'."""
        ...

    def loss(self, rows: Rows) -> Tensor:
        """Return the summed loss of sequences, a scalar in float64."""
        ...


class Trained(Protocol):
    """What is trained: tensors, or adapters of linears."""

    parameters: dict[str, nn.Parameter]  # of those that are divided over workers the own rows
    units: dict[str, float]
    divided: dict[str, nn.Parameter]  # of those, as the model has them

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts for a pass through a layer, and for the same again."""
        ...

    def begin_step(self) -> None:
        """Prepare for the parts of a step."""
        ...

    def begin_part(self, step: int, part: int) -> None:
        """Prepare for one of them."""
        ...

    def end_part(self) -> None:
        """Prepare for anything but a part of a step."""
        ...

    def results(self) -> dict[str, Tensor]:
        """Return name -> value of all tensors of the model that were trained."""
        ...


class Lessons:
    """The steps of a training, by number, for the workers of a group."""

    def __init__(
        self,
        source: Source,
        trained: Trained,
        recovery: Recovery,
        group: Group,
        *,
        num_sequences: int,
        replaces: Replaces = nothing,
    ) -> None:
        """Share the work out.

        ``replaces`` is of the steps alone: held-out losses are of all that is trained.

        Raises:
            ConfigError: the parts of a batch cannot be divided by the workers.
        """
        self._source, self._trained = source, trained
        self.terms = source.terms
        self._recovery, self._group, self._replaces = recovery, group, replaces
        self._last = num_sequences - recovery.held_out  # one past those that are trained on
        self._held = range(self._last, num_sequences)
        self._size = recovery.batch // recovery.parts  # sequences of a part
        if recovery.parts % group.size:
            raise ConfigError(
                f"the {recovery.parts} parts of a batch cannot be divided by {group.size} workers",
                hint="use a number of workers that divides the parts",
            )

    def gradient(self, place: Place) -> tuple[list[Tensor | None], float]:
        """Return the gradient of each tensor at a step, and the mean loss before it.

        None for a tensor that takes no part in the step.
        """
        recovery, group = self._recovery, self._group
        step = place.step
        rows = samples(step, batch=recovery.batch, num_sequences=self._last, seed=recovery.seed)
        self._trained.begin_step()
        own = range(group.rank, recovery.parts, group.size)
        with self._replaces(place) as is_absent:
            parts = (self._part(rows, step, number) for number in own)
            *summed, total = group.summed(parts)
        names, divided = self._trained.parameters, self._trained.divided
        gradients = dict(zip([n for n in names if n not in divided], summed, strict=True))
        gradients |= {name: local(_taken(each)) for name, each in divided.items()}
        found = [None if is_absent(name) else gradients[name] for name in names]
        return found, float(total) / self._terms(recovery.batch)

    def held_out_loss(self) -> float:
        """Return the mean loss of the held-out sequences."""
        size, group = self._size, self._group
        parts = [self._held[at : at + size] for at in range(0, len(self._held), size)]
        losses = [self._source.loss(rows) for rows in parts[group.rank :: group.size]]
        if len(losses) < -(-len(parts) // group.size):  # in the last round none is left for this
            self._source.loss(parts[-1])  # all workers must be there where a layer is gathered
            device = next(iter(self._trained.parameters.values())).device
            losses.append(torch.zeros((), dtype=torch.float64, device=device))
        (total,) = group.summed([[loss] for loss in losses])
        return float(total) / self._terms(len(self._held))

    def _part(self, rows: Rows, step: int, number: int) -> list[Tensor]:
        """Return the gradients of a part, and its share of the loss behind them."""
        own = rows[number * self._size : (number + 1) * self._size]
        self._trained.begin_part(step, number)
        loss = self._source.backward(own, 1 / self._terms(self._recovery.batch))
        self._trained.end_part()
        return [*self._gradients(), loss]

    def _gradients(self) -> Iterator[Tensor]:
        """Yield those of a part that are not divided."""
        for name, parameter in self._trained.parameters.items():
            if name not in self._trained.divided:
                yield _taken(parameter)

    def _terms(self, num_sequences: int) -> int:
        return num_sequences * self._source.terms


def _taken(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, which has none from now on."""
    found = parameter.grad
    parameter.grad = None
    return torch.zeros_like(parameter) if found is None else found


def samples(step: int, *, batch: int, num_sequences: int, seed: int) -> list[int]:
    """Return the sequences of a step; each epoch has all, in an order drawn from its number.

    A batch may begin in one epoch and end in the next.
    """
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // num_sequences, -(-last // num_sequences))
    orders = [np.random.default_rng([seed, each]).permutation(num_sequences) for each in epochs]
    start = first - epochs[0] * num_sequences
    found: list[int] = np.concatenate(orders)[start : start + batch].tolist()
    return found
