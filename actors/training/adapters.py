"""Low-rank changes of linears, which are trained in place of the linears and then added to them.

A linear of weight W computes ``x W^T + alpha / rank * (drop(x) A^T) B^T`` (LoRA, arXiv:2106.09685).
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from actors.devices.transfer import whole
from actors.training.division import as_divided, own_rows
from actors.training.trained import rms
from planners.recovery import Recovery

FIRST, SECOND = ".lora_A", ".lora_B"  # behind the name of a linear


class Adapters:
    """Two factors for each of some linears.

    The linears may be divided over workers; each holds the whole factors.

    Attributes:
        parameters: name -> factor.
        units: name -> what a relative rate is relative to. For A its root mean square; for B, which
            is 0 at first, the value at which a step of Adam changes the linear as much as if the
            linear itself were trained at that rate.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], recovery: Recovery) -> None:
        """Draw the factors A from (seed, name), and hook them into the linears; B is 0."""
        self._linears, self._recovery = dict(sorted(linears.items())), recovery
        self._scale = recovery.alpha / recovery.rank
        self._generator: torch.Generator | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.divided: dict[str, nn.Parameter] = {}
        self.units: dict[str, float] = {}
        for name, each in self._linears.items():
            first, second = _factors(each, recovery.rank, _seed(recovery.seed, name))
            self.parameters |= {name + FIRST: first, name + SECOND: second}
            # Signs of rank products: their sum is about sqrt(rank) times one of them.
            one = rms(first) * recovery.rank**0.5 * self._scale
            units = (rms(first), rms(each.weight) / one) if recovery.relative else (1.0, 1.0)
            self.units |= dict(zip((name + FIRST, name + SECOND), units, strict=True))
            each.register_forward_hook(partial(self._changed, first, second))

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts for a pass through a layer, and for the same again: it drops the same."""
        before: list[Tensor] = []
        return self._noting(before), self._returning(before)

    @contextmanager
    def _noting(self, before: list[Tensor]) -> Iterator[None]:
        if self._generator:
            before.append(self._generator.get_state())
        yield

    @contextmanager
    def _returning(self, before: list[Tensor]) -> Iterator[None]:
        if not self._generator:
            yield
            return
        now = self._generator.get_state()
        self._generator.set_state(before[0])
        try:
            yield
        finally:
            self._generator.set_state(now)

    def begin_step(self) -> None:
        """Prepare for the parts of a step."""

    def begin_part(self, step: int, part: int) -> None:
        """Drop inputs from now on, drawn from (seed, step, part) in the order of the linears."""
        if self._recovery.dropout:
            device = next(iter(self.parameters.values())).device
            seed = _seed(self._recovery.seed, f"step {step} part {part}")
            self._generator = torch.Generator(device).manual_seed(seed)

    def end_part(self) -> None:
        """Drop no inputs."""
        self._generator = None

    def results(self) -> dict[str, Tensor]:
        """Return name -> weight of each linear, changed by its factors."""
        return {f"{name}.weight": self._merged(name) for name in self._linears}

    def _merged(self, name: str) -> Tensor:
        first, second = (self.parameters[name + each].detach() for each in (FIRST, SECOND))
        weight = self._linears[name].weight.detach()
        merged = whole(weight) + self._scale * (second @ first)
        return as_divided(own_rows(merged, weight), weight)

    def _changed(
        self, first: Tensor, second: Tensor, module: nn.Module, args: tuple[Tensor], out: Tensor
    ) -> Tensor:
        del module
        return out + self._scale * product(product(self._dropped(args[0]), first), second)

    def _dropped(self, x: Tensor) -> Tensor:
        if self._generator is None:
            return x
        kept = 1 - self._recovery.dropout
        drawn = torch.rand(x.shape, generator=self._generator, device=x.device)
        return x * (drawn < kept) / kept


def _factors(each: nn.Linear, rank: int, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (rank, in), uniform within +-1/sqrt(in), and B (out, rank) of zeros."""
    out_dim, in_dim = each.weight.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rank, in_dim, generator=generator)
    first = (2 * drawn - 1) / in_dim**0.5
    second = torch.zeros(out_dim, rank)
    device = each.weight.device
    return nn.Parameter(first.to(device)), nn.Parameter(second.to(device))


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
