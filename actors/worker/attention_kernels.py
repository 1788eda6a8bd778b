"""Which kernels torch computes the attention of a model with."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode


class AttentionKernels(TorchFunctionMode):
    """Notes, while it is entered, the kernel of each call of torch's attention.

    torch is asked about the very call that it gets, with its mask, strides and shared heads. A
    model that computes attention in another way leaves nothing here.

    Attributes:
        names: kernels in the order of the calls: ``flash``, ``efficient``, ``cudnn`` or ``math``,
            of which the last one is none, but single products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note which kernel a call of attention gets, and make the call."""
        del types
        if func is torch.nn.functional.scaled_dot_product_attention:
            chosen = SDPBackend(torch._fused_sdp_choice(*args, **(kwargs or {})))
            self.names.append(chosen.name.removesuffix("_ATTENTION").lower())
        return func(*args, **(kwargs or {}))
