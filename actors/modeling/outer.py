"""A model with its layers taken out: embedding, positions, final norm, head and loss.

Whoever passes tokens through a model layer by layer does it with an `OuterModel`. All that is known
here of the classes of transformers, and of what stands before, beside and behind the layers, is
known nowhere else.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actors.devices.transfer import to_device
from actors.modeling.modeling_compressed import CompressedConfig, CompressedForCausalLM
from actors.numerics.loss import next_token_nll
from planners.families._base import Family
from planners.memory.peaks import LOGIT_TOKENS

transformers_logging.disable_progress_bar()

OWN = ("model_type", "dtype", "torch_dtype", "auto_map")  # keys that are not passed on
Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Weights(Protocol):
    """Where the tensors of a model are read: an `actors.storage.checkpoint.Checkpoint`."""

    @property
    def locations(self) -> Mapping[str, object]:
        """The names of all tensors, among other things."""

    def read(self, name: str) -> Tensor:
        """Return a tensor."""

    def stream_prefix(self, prefix: str) -> Iterable[tuple[str, Tensor]]:
        """Yield the tensors whose names begin so, by the rest of their names."""


def empty_model(config: Mapping[str, Any]) -> Any:
    """Return the model of a ``config.json`` on the meta device: it takes no memory for weights.

    The dense one is of transformers' own class, the compressed one of the file that travels with a
    result; both are used the same way from here on.
    """
    rest = {k: v for k, v in config.items() if k not in OWN}
    compressed = config["model_type"] == CompressedConfig.model_type
    known = (
        CompressedConfig(**rest)
        if compressed
        else AutoConfig.for_model(config["model_type"], **rest)
    )
    known._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = (
            CompressedForCausalLM(known) if compressed else AutoModelForCausalLM.from_config(known)
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(known)  # its frequencies are computed
    return model.eval()


class OuterModel:
    """A model without its layers; embedding and head are there once they have been read."""

    def __init__(
        self, config: Mapping[str, Any], family: Family, *, dtype: torch.dtype, device: str
    ) -> None:
        """Build the modules of a ``config.json``; no tensor is read.

        Args:
            config: of the model, dense or compressed.
            family: names its tensors.
            dtype: to compute in; tensors are converted as they are read.
            device: where to compute.
        """
        self._family, self._dtype, self._device = family, dtype, device
        self._model = empty_model(config)
        self._rotary = self._model.model.rotary_emb.to(device)
        self._embedding: Tensor | None = None  # (vocabulary, width)
        self._head: Tensor | None = None  # (vocabulary, width)
        self._norm: nn.Module | None = None

    def layer(self, index: int, tensors: Named) -> nn.Module:
        """Take layer ``index`` out of the model, once, and return it with these tensors.

        Args:
            index: of the layer.
            tensors: named as below the layer. Of pairs that are read one at a time, one at a time
                is in memory in the dtype it came in.
        """
        layers = self._model.model.layers
        module: nn.Module = layers[index]
        layers[index] = nn.Identity()  # else its weights would live as long as the model
        return self._filled(module, tensors)

    def read_embedding(self, weights: Weights) -> None:
        """Read what `embed` needs.

        Raises:
            ModelError: a tensor is missing or not finite.
        """
        self._embedding = self._table(weights, self._family.embedding)

    def read_head(self, weights: Weights) -> None:
        """Read what `final`, `logits` and `loss` need; a tied head is the embedding's tensor.

        Raises:
            ModelError: a tensor is missing or not finite.
        """
        name = self._family.head_among(weights.locations)
        if name == self._family.embedding and self._embedding is not None:
            self._head = self._embedding
        else:
            self._head = self._table(weights, name)
        # Of a norm whose scale was folded into the head no tensor is stored.
        prefix = self._family.final_norm.removesuffix("weight")
        self._norm = self._filled(self._model.model.norm, weights.stream_prefix(prefix))

    def tensors(self) -> list[Tensor]:
        """Return the weights that have been read; the table of a tied model once."""
        norm = [] if self._norm is None else [*self._norm.parameters()]
        tables = [table for table in (self._embedding, self._head) if table is not None]
        return [*{id(table): table for table in tables}.values(), *norm]

    def embed(
        self, ids: Int[Tensor, "batch tokens"], *, start: int = 0
    ) -> Float[Tensor, "batch tokens width"]:
        """Return what enters the first layer, for tokens at positions start, start + 1, ..."""
        del start  # every family here tells positions to its layers: `layer_arguments`
        assert self._embedding is not None  # it was read
        return nn.functional.embedding(ids.to(self._device), self._embedding)

    def layer_arguments(
        self, hidden: Float[Tensor, "batch tokens width"], *, start: int = 0
    ) -> dict[str, Any]:
        """Return what every layer is called with beside ``hidden``, at positions start, ..."""
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        angles = self._rotary(hidden, position_ids=positions)  # cosines and sines
        return {"attention_mask": None, "position_embeddings": angles}

    def final(self, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        """Return what the head reads, from what leaves the last layer."""
        assert self._norm is not None  # it was read
        normed: Tensor = self._norm(hidden)
        return normed

    def logits(self, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        """Return the logits, (batch, tokens, vocabulary), of what leaves the last layer."""
        assert self._head is not None  # it was read
        return self.final(hidden) @ self._head.T

    def loss(
        self, hidden: Float[Tensor, "batch tokens width"], ids: Int[Tensor, "batch tokens"]
    ) -> tuple[float, int]:
        """Return the summed nats of the next tokens, and how many these are.

        Logits are formed of so many tokens at a time that they take little memory.
        """
        assert self._head is not None  # it was read
        return next_token_nll(self.final(hidden), self._head, ids, block=LOGIT_TOKENS)

    def _table(self, weights: Weights, name: str) -> Tensor:
        return to_device(weights.read(name), self._device, self._dtype)

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
