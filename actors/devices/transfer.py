"""Copy tensors to a device and back through pinned memory.

A copy from pinned memory runs while the host reads the next tensor; torch keeps the memory alive
until the copy is done. On a CPU nothing is copied.
"""

import torch
from torch import Tensor

LARGEST_PINNED = 2**30  # torch caches pinned memory; a gram of the FFN is read once and pageable


def to_device(tensor: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device; it is copied in its stored dtype and converted there."""
    if device == "cuda" and tensor.device.type == "cpu" and tensor.nbytes <= LARGEST_PINNED:
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device=device, dtype=dtype or tensor.dtype)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory, after the copy has finished."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.cpu()
    found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    found.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return found
