"""A model whose layers are divided over the workers of a group, by torch's FSDP2.

A worker holds some rows of each tensor of the layers. All workers gather a layer where tokens pass
it, forward and again backward, and let it go behind it; what a layer keeps for its backward pass is
computed a second time there, so between the two only its input is kept. Each worker holds the whole
embedding, final norm and head.

The library's reduction is replaced by one in the order of the parts, so no bit depends on how many
workers there are, or on whether the model is divided at all.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

# Return a context for a pass through a layer, and one for its repetition.
Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]


class Division:
    """How models are divided over the workers of torch's default group."""

    def __init__(self, device: str) -> None:
        """Divide over all of them."""
        self._mesh = init_device_mesh(device, (distributed.get_world_size(),))
        self._sums: list[_OrderedSum] = []

    def divide(self, body: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Divide the layers of a model that has no values yet; see `own_rows` for these.

        ``body`` contains the layers, and is called with tokens.
        """
        outside = set(body.parameters())
        for layer in layers:
            outside -= set(layer.parameters())
            self._fully_shard(layer)
        self._fully_shard(body, whole=outside)

    def _fully_shard(self, module: nn.Module, whole: set[nn.Parameter] | None = None) -> None:
        divided = fully_shard(module, mesh=self._mesh, ignored_params=whole)
        self._sums.append(_OrderedSum())
        # The class that it expects is a private protocol of the library.
        divided.set_custom_reduce_scatter(self._sums[-1])  # type: ignore[arg-type]
        divided.set_gradient_divide_factor(1.0)  # a sum, no mean
        divided.set_force_sum_reduction_for_comms(enable=True)

    def begin_step(self) -> None:
        """Begin new sums of gradients."""
        for each in self._sums:
            each.total = None


class _OrderedSum:
    """Adds the gradients of one layer, of all workers and rounds, in the order of the parts.

    In each round each worker has a part, in the order of the workers.

    Attributes:
        total: of the rounds so far.
    """

    total: Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for the library's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Set the first to the total with this worker's rows of each worker's gradient added."""
        del op, async_op
        found = torch.empty_like(input_tensor)
        distributed.all_to_all_single(found, input_tensor, group=group)
        rows = list(found.view(group.size(), -1))
        output_tensor.copy_(rows.pop(0) if self.total is None else self.total)
        for each in rows:
            output_tensor += each
        self.total = output_tensor


def recompute(layer: nn.Module, contexts: Contexts) -> None:
    """Let a layer compute what its backward pass needs a second time, in place of keeping it."""
    layer.forward = partial(
        checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,
        context_fn=contexts,
    )  # fmt: skip


def own_rows(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy of this worker's rows of a tensor, if another is divided; else the tensor."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    pieces, rank = torch.chunk(value, mesh.size()), mesh.get_local_rank()
    return (pieces[rank] if rank < len(pieces) else value[:0]).clone()


def as_divided(own: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of which all workers have such rows; the same tensor if none is divided."""
    if not isinstance(like, DTensor):
        return own
    return DTensor.from_local(
        own, like.device_mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
    )


def is_divided(tensor: Tensor) -> bool:
    """Return whether this worker may have only some rows of a tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this worker has, not copied."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
