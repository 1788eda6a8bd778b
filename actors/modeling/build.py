"""A checkpoint's own layer classes, built without memory and filled one layer at a time."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actors.devices.transfer import to_device
from actors.modeling.modeling_compressed import CompressedConfig, CompressedForCausalLM

transformers_logging.disable_progress_bar()

OWN = ("model_type", "dtype", "torch_dtype", "auto_map")  # keys that are not passed on
Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Skeleton:
    """A model on the meta device: its classes and shapes, none of its weights.

    The dense forward is transformers' own, the compressed one the file that travels with a result;
    both are used the same way from here on.
    """

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype, device: str) -> None:
        """Build the modules of a ``config.json``; takes no memory for weights."""
        self._dtype, self._device = dtype, device
        rest = {k: v for k, v in config.items() if k not in OWN}
        compressed = config["model_type"] == CompressedConfig.model_type
        self.config = (
            CompressedConfig(**rest)
            if compressed
            else AutoConfig.for_model(config["model_type"], **rest)
        )
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = (
                CompressedForCausalLM(self.config)
                if compressed
                else AutoModelForCausalLM.from_config(self.config)
            )
        self._model = model.eval()
        self._rotary = type(model.model.rotary_emb)(self.config).to(device)

    def layer(self, index: int, tensors: Named) -> nn.Module:
        """Return layer ``index`` holding these tensors, named as below the layer.

        Of pairs that are read one at a time, one at a time is in memory in the dtype it came in.
        """
        return self._filled(self._model.model.layers[index], tensors)

    def final_norm(self, tensors: Named) -> nn.Module:
        """Return the norm before the head."""
        return self._filled(self._model.model.norm, tensors)

    def angles(self, hidden: Tensor, *, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return cos and sin of positions start, ... for activations (batch, tokens, width)."""
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        cos, sin = self._rotary(hidden, position_ids=positions)
        return cos, sin

    def _filled(self, module: nn.Module, tensors: Named) -> nn.Module:
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        moved = {
            name: to_device(
                tensor, self._device, self._dtype if tensor.is_floating_point() else None
            )
            for name, tensor in pairs
        }
        module.load_state_dict(moved, strict=True, assign=True)
        return module.requires_grad_(requires_grad=False)
