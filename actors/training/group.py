"""The workers that train one model together, as each of them sees the others."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed

BLOCK = 2**22  # elements that are gathered at a time


class Group(Protocol):
    """The workers of one training; every call but `rank` and `size` is made by all of them.

    Attributes:
        rank: of this worker, from 0.
        size: number of workers.
    """

    rank: int
    size: int

    def summed(self, parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """Return the sums of the tensors of all parts, those of all workers, in order.

        Args:
            parts: of this worker, each with the same tensors; of n workers the first has the parts
                0, n, 2 n.., every worker as many. They may be computed as they are asked for, and
                added to.
        """
        ...

    def agreed(self, number: float) -> float:
        """Return the number of the first worker."""
        ...

    def leaves(self) -> bool:
        """Return whether a machine of the group will be gone soon."""
        ...


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def summed(self, parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """Return the sums over the parts, of which two are in memory at one time."""
        rest = iter(parts)
        totals = list(next(rest))
        for part in rest:
            for total, each in zip(totals, part, strict=True):
                total += each
        return totals

    def agreed(self, number: float) -> float:
        """Return the number."""
        return number

    def leaves(self) -> bool:
        """Return no: nobody says so."""
        return False


class Processes:
    """The processes of torch's default group, which is set up already."""

    def __init__(self, leaves: Callable[[], bool] = lambda: False) -> None:
        """Join the default group; ``leaves`` says of this machine and others if one will go."""
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._leaves = leaves

    def summed(self, parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """Return the sums over the parts of all workers, of a few elements at a time.

        No reduction of the library is used: its order depends on the number of workers.
        """
        rest = iter(parts)
        totals = [self._added(None, each) for each in next(rest)]
        for part in rest:
            for total, each in zip(totals, part, strict=True):
                self._added(total, each)
        return totals

    def agreed(self, number: float) -> float:
        """Return the number of the first worker."""
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        told = torch.tensor([number], dtype=torch.float64, device=device)
        distributed.broadcast(told, src=0)
        return float(told)

    def leaves(self) -> bool:
        """Return whether a machine of the group will be gone soon."""
        return self._leaves()

    def _added(self, total: Tensor | None, own: Tensor) -> Tensor:
        """Add the tensors of all workers to a total, the first to a new one, in their order."""
        first = total is None
        sums = (
            torch.empty(own.shape, dtype=own.dtype, device=own.device) if total is None else total
        )
        pieces = (torch.split(each.reshape(-1), BLOCK) for each in (sums, own))
        for into, piece in zip(*pieces, strict=True):
            all_ = [torch.empty_like(piece) for _ in range(self.size)]
            distributed.all_gather(all_, piece.contiguous())
            if first:
                into.copy_(all_.pop(0))
            for each in all_:
                into += each
        return sums
