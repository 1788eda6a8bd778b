"""Everything of a model except its layers: embedding, positions, final norm, head and loss.

Code that passes tokens through a model layer by layer uses an `OuterModel`. Only this module knows
the classes of transformers and what is before, beside and after the layers.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actors.devices.transfer import to_device
from actors.modeling.travelling import COMPRESSED, classes
from actors.numerics.loss import next_token_nll
from planners.families._base import Family
from planners.memory.peaks import LOGIT_TOKENS

transformers_logging.disable_progress_bar()

OWN = ("model_type", "dtype", "torch_dtype", "auto_map")  # keys not passed to transformers
Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Weights(Protocol):
    """The source of a model's tensors: an `actors.storage.checkpoint.Checkpoint`."""

    @property
    def locations(self) -> Mapping[str, object]:
        """A mapping with the names of all tensors as keys."""

    def read(self, name: str) -> Tensor:
        """Return a tensor."""

    def stream_prefix(self, prefix: str) -> Iterable[tuple[str, Tensor]]:
        """Yield the tensors whose names begin with a prefix, with the rest of their names."""


def empty_model(config: Mapping[str, Any]) -> Any:
    """Return the model of a ``config.json`` on the meta device, without memory for weights.

    A dense model has transformers' own class, a compressed one the class in the file that is stored
    with results; both have the same interface.
    """
    rest = {k: v for k, v in config.items() if k not in OWN}
    code = classes(config["compressed_from"]) if config["model_type"] == COMPRESSED else None
    known = (
        code.CompressedConfig(**rest)
        if code
        else AutoConfig.for_model(config["model_type"], **rest)
    )
    known._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = (
            code.CompressedForCausalLM(known) if code else AutoModelForCausalLM.from_config(known)
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(
        known
    )  # on the CPU: its frequencies are computed
    return model.eval()


class OuterModel:
    """A model without its layers; embedding and head are available once they have been read."""

    def __init__(
        self, config: Mapping[str, Any], family: Family, *, dtype: torch.dtype, device: str
    ) -> None:
        """Build the modules of a ``config.json`` without reading any tensor.

        Args:
            config: of the model, dense or compressed.
            family: of the model, which has the names of its tensors.
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
        """Remove layer ``index`` from the model and return it with the given tensors; call it once.

        Args:
            index: of the layer.
            tensors: keyed by their names relative to the layer. From an iterator of pairs, only
                one tensor at a time is in memory in its original dtype.
        """
        layers = self._model.model.layers
        module: nn.Module = layers[index]
        layers[index] = nn.Identity()  # else the model would keep its weights in memory
        return self._filled(module, tensors)

    def read_embedding(self, weights: Weights) -> None:
        """Read the tensor that `embed` needs.

        Raises:
            ModelError: a tensor is missing or not finite.
        """
        self._embedding = self._table(weights, self._family.embedding)

    def read_head(self, weights: Weights) -> None:
        """Read the tensors that `final`, `logits` and `loss` need; a tied head is the embedding.

        Raises:
            ModelError: a tensor is missing or not finite.
        """
        name = self._family.head_among(weights.locations)
        if name == self._family.embedding and self._embedding is not None:
            self._head = self._embedding
        else:
            self._head = self._table(weights, name)
        # A norm whose scale was folded into the head has no stored tensor.
        prefix = self._family.final_norm.removesuffix("weight")
        self._norm = self._filled(self._model.model.norm, weights.stream_prefix(prefix))

    def tensors(self) -> list[Tensor]:
        """Return the weights that have been read; the shared table of a tied model once."""
        norm = [] if self._norm is None else [*self._norm.parameters()]
        tables = [table for table in (self._embedding, self._head) if table is not None]
        return [*{id(table): table for table in tables}.values(), *norm]

    def embed(
        self, ids: Int[Tensor, "batch tokens"], *, start: int = 0
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the input of the first layer for tokens at positions start, start + 1, ..."""
        del start  # in every family here positions are given to the layers: `layer_arguments`
        assert self._embedding is not None  # it was read
        return nn.functional.embedding(ids.to(self._device), self._embedding)

    def layer_arguments(
        self, hidden: Float[Tensor, "batch tokens width"], *, start: int = 0
    ) -> dict[str, Any]:
        """Return the keyword arguments of every layer, for tokens at positions start, ..."""
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        angles = self._rotary(hidden, position_ids=positions)  # cosines and sines
        return {"attention_mask": None, "position_embeddings": angles}

    def final(self, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        """Return the input of the head, given the output of the last layer."""
        assert self._norm is not None  # it was read
        normed: Tensor = self._norm(hidden)
        return normed

    def logits(self, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        """Return the logits, (batch, tokens, vocabulary), given the output of the last layer."""
        assert self._head is not None  # it was read
        return self.final(hidden) @ self._head.T

    def loss(
        self, hidden: Float[Tensor, "batch tokens width"], ids: Int[Tensor, "batch tokens"]
    ) -> tuple[float, int]:
        """Return the summed nats of the next tokens, and their number.

        Logits are computed for `LOGIT_TOKENS` tokens at a time, to save memory.
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
