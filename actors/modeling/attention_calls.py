"""Hear of each call of torch's attention, whatever model makes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class AttentionCalls(TorchFunctionMode):
    """Tells, while it is entered, of each call of torch's attention before it is made.

    A model that computes attention in another way is not heard of.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        """``tell`` is called with the arguments of attention."""
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Tell of a call of attention; make every call."""
        del types
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._tell(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
