"""Which kernels torch computes the attention of a model with."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from actors.modeling.attention_calls import AttentionCalls


class AttentionKernels(AttentionCalls):
    """Notes, while it is entered, the kernel of each call of torch's attention.

    torch is asked about the very call that it gets, with its mask, strides and shared heads. A
    model that computes attention in another way leaves nothing here.

    Attributes:
        names: kernels in the order of the calls: ``flash``, ``efficient``, ``cudnn`` or ``math``,
            of which the last one is none, but single products.
    """

    def __init__(self) -> None:
        super().__init__(self._note)
        self.names: list[str] = []

    def _note(self, *args: Any, **how: Any) -> None:
        chosen = SDPBackend(torch._fused_sdp_choice(*args, **how))
        self.names.append(chosen.name.removesuffix("_ATTENTION").lower())
