"""Copy tensors to a device and back through pinned memory.

A copy from pinned memory runs while the host reads the next tensor; torch keeps the memory alive
until the copy is done. On a CPU nothing is copied.
"""

import os

import torch
from torch import Tensor

READERS_AHEAD = 8  # threads that read and hash for an accelerator; a CPU reads one tensor ahead
LARGEST_PINNED = 2**30  # torch caches pinned memory; a gram of the FFN is read once and pageable


def host_buffer(size: int, device: str) -> Tensor:
    """Return ``size`` bytes of uninitialised memory to read into what goes to a device.

    For an accelerator it is pinned: torch keeps freed pinned memory and gives it out again.
    """
    small = size <= LARGEST_PINNED
    return torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda" and small)


def pinned(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor of the host in memory from which a device copies without the host waiting.

    A tensor that is there already, or is too large, is returned as it is.
    """
    if device == "cuda" and tensor.device.type == "cpu" and tensor.nbytes <= LARGEST_PINNED:
        return tensor.pin_memory()
    return tensor


def readers(device: str) -> int:
    """Return how many tensors are read ahead of what a device does."""
    return min(READERS_AHEAD, os.cpu_count() or 1) if device == "cuda" else 1


def to_device(tensor: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device; it is copied in its stored dtype and converted there."""
    source = pinned(tensor, device)
    if device == "cuda" and source.is_pinned():
        source = source.to(device, non_blocking=True)
    return source.to(device=device, dtype=dtype or tensor.dtype)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be divided over workers; all of them must call this."""
    gathered = getattr(tensor, "full_tensor", None)  # of a DTensor, whose class is slow to import
    return tensor if gathered is None else gathered()


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory, after the copy has finished."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda" or tensor.nbytes > LARGEST_PINNED:
        return tensor.cpu()
    found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    found.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return found
