"""A whole model, dense or compressed, whose logits can be computed for some tokens at a time."""

import contextlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from actors.devices.transfer import to_device
from actors.modeling.outer_model import empty_model
from actors.storage.checkpoint import Checkpoint
from actors.training.division import Division, as_divided, own_rows
from planners.families import load as load_family


class WholeModel:
    """Transformers' class with all weights, in two steps: tokens to hidden states to logits.

    Attributes:
        module: the model with its head, without dropout; no weight has a gradient unless the caller
            asks for it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        products: torch.dtype | None = None,
        division: Division | None = None,
    ) -> None:
        """Read all tensors.

        Args:
            checkpoint: the model.
            dtype: of the weights; each is converted as it is read.
            device: of the weights.
            products: dtype in which matrices are multiplied, if another one.
            division: of the layers over workers, if there is one.

        Raises:
            ModelError: a tensor is missing or not finite.
        """
        self._family = load_family(checkpoint.shape.family)
        self._device, self._products = device, products or dtype
        self._dtype, self._division = dtype, division
        self.module: Any = empty_model(checkpoint.config)
        self._body_name = self._family.layer.removesuffix(".{i}").rpartition(".")[0]
        self._body = self.module.get_submodule(self._body_name)
        if division:
            division.divide(self._body, self.layers.values())
        empty = dict(self.module.named_parameters(remove_duplicate=False))
        tensors = {}
        for name, tensor in checkpoint.stream_prefix("", shared=False):
            like = empty.get(name, tensor)  # a buffer is whole
            own = own_rows(tensor, like)
            own = to_device(own, device, dtype if own.is_floating_point() else None)
            tensors[name] = as_divided(own, like)
        head = self._family.head_among(checkpoint.names)
        tensors.setdefault(self._family.head, tensors[head])
        tensors |= {name: tensors[stored] for name, stored in checkpoint.shared.items()}
        self.module.load_state_dict(tensors, strict=True, assign=True)
        for name, stored in checkpoint.shared.items():
            module, _, last = name.rpartition(".")
            setattr(self.module.get_submodule(module), last, self.module.get_parameter(stored))
        if head != self._family.head:
            self.module.get_output_embeddings().weight = self.module.get_input_embeddings().weight
        self.module.to(device)  # what is computed and not stored, such as the frequencies of rope
        self.module.requires_grad_(requires_grad=False)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Prefix of the names of a layer's tensors -> the layer."""
        names = self._family.layer.removesuffix(".{i}")
        found = self.module.get_submodule(names)
        return {f"{names}.{index}.": layer for index, layer in enumerate(found)}

    @property
    def final_norm(self) -> tuple[str, nn.Module]:
        """Prefix of the names of its tensors, and the norm before the head."""
        name = self._family.final_norm.rpartition(".")[0]
        return f"{name}.", self.module.get_submodule(name)

    def hidden(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """Return what the head reads, behind the final norm."""
        with self._multiplying():
            found: Tensor = self._body(
                input_ids=ids.to(self._device), use_cache=False
            ).last_hidden_state
        return found

    def logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """Return the logits of any tokens, given what the head reads.

        The model itself makes them, so whatever it does to logits behind its head is done: only
        what is before its head is replaced, by a function that returns the hidden states.
        """
        given = _Given(hidden[None])
        parent, _, name = self._body_name.rpartition(".")
        above = self.module.get_submodule(parent)
        setattr(above, name, given)  # the body itself would gather what is divided
        try:
            with self._multiplying():
                found: Tensor = self.module(inputs_embeds=hidden[None]).logits
        finally:
            setattr(above, name, self._body)
        return found[0]

    def _multiplying(self) -> contextlib.AbstractContextManager[object]:
        if self._products == self._dtype:
            return contextlib.nullcontext()
        # Kept for a whole pass, the copies in another dtype would be of all layers.
        keeps = self._division is None
        return torch.autocast(self._device, dtype=self._products, cache_enabled=keeps)


class _Given(nn.Module):
    """Stands where a model has all that is before its head."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._found = BaseModelOutputWithPast(last_hidden_state=hidden)

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return self._found
