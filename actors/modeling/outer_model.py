"""Everything of a model except its layers: embedding, positions, masks, final norm, head and loss.

Code that passes tokens through a model layer by layer uses an `OuterModel`. It is transformers' own
model with a stub in place of each layer: what the first stub receives is the embedding, what all of
them are called with are the arguments of the layers, and what the model makes of the output of the
last one are the logits. So nothing of a model is known here but where its layers and tables are.
"""

import inspect
from collections.abc import Container, Iterable, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

# Loaded here for what the classes of all model types share: memory is measured from then on.
import actors.modeling.modeling_compressed  # noqa: F401
from actors.devices.transfer import to_device
from actors.modeling.travelling import COMPRESSED, classes
from actors.numerics.loss import next_token_nll
from planners.families._base import Family
from planners.memory.peaks import LOGIT_TOKENS

transformers_logging.disable_progress_bar()

PER_LAYER = ("layer_types", "no_rope_layers")  # keys with an entry for each layer
OWN = ("model_type", "dtype", "torch_dtype", "auto_map")  # keys not passed to transformers
Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Weights(Protocol):
    """The source of a model's tensors: an `actors.storage.checkpoint.Checkpoint`."""

    @property
    def names(self) -> Container[str]:
        """The names of all tensors."""

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
    _compute_buffers(model)
    return model.eval()


def rope_of(config: Mapping[str, Any]) -> tuple[list[float], float, int]:
    """Return what a stock model makes of its rotary settings.

    Returns:
        The frequency of each pair of channels, radians a token; the factor of its cosines and
        sines; the longest sequence.
    """
    model = empty_model({**config, "num_hidden_layers": 1, **_first_of_lists(config)})
    rope = model.base_model.rotary_emb
    longest = int(model.config.max_position_embeddings)
    return rope.inv_freq.tolist(), float(rope.attention_scaling), longest


def _first_of_lists(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that have an entry for each layer, with that of the first."""
    return {key: config[key][:1] for key in PER_LAYER if config.get(key)}


def _compute_buffers(model: Any) -> None:
    """Compute what is not stored with a model, such as the frequencies of rope, on the CPU."""
    for module in model.modules():
        computed = module._non_persistent_buffers_set
        if computed:
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)  # weights stay on the meta device


class _ReachedError(Exception):
    """Ends a forward pass of the model at the last layer of interest."""


class _Trace:
    """One forward pass through the stubs.

    Attributes:
        calls: what each layer so far was called with: its input, and its other arguments by name.
        end: how many layers to reach.
        output: what the last layer returns, from which the model goes on; None ends the pass there.
    """

    def __init__(self, end: int, output: Tensor | None = None) -> None:
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []
        self.end, self.output = end, output

    def received(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Note the call of a layer, and return what it shall return."""
        self.calls.append((hidden, arguments))
        if len(self.calls) < self.end:
            return hidden
        if self.output is None:
            raise _ReachedError
        return self.output


class _Stub(nn.Module):
    """Stands for a layer that returns a tensor, without its weights.

    It has the attributes of the layer that the model may read, such as its kind of attention.
    """

    trace: _Trace

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        own = vars(self)  # among them the weights and modules of a module
        own.update({name: value for name, value in vars(layer).items() if name not in own})
        self._names = tuple(inspect.signature(layer.forward).parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the trace of this pass says."""
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return self.trace.received(arguments.pop(self._names[0]), arguments)


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
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))
        layers = self._model.get_submodule(family.layer.removesuffix(".{i}"))
        self._layers: dict[int, nn.Module] = dict(enumerate(layers))
        self._stubs = [_Stub(layer) for layer in layers]
        for index, stub in enumerate(self._stubs):
            layers[index] = stub
        self._norm = self._model.get_submodule(family.final_norm.rpartition(".")[0])
        self._tables: dict[str, nn.Parameter] = {}  # that were read, by name
        if family.positions:
            # Every pass adds them to its input, which is of interest only where they are read.
            dims = self._model.get_parameter(family.positions).shape
            nothing = torch.zeros((), dtype=dtype, device=device).expand(dims)
            self._put_positions(nn.Parameter(nothing, requires_grad=False))

    def layer(self, index: int, tensors: Named) -> nn.Module:
        """Remove layer ``index`` from the model and return it with the given tensors; call it once.

        Args:
            index: of the layer.
            tensors: keyed by their names relative to the layer. From an iterator of pairs, only
                one tensor at a time is in memory in its original dtype.
        """
        return self._filled(self._layers.pop(index), tensors)

    def read_embedding(self, weights: Weights) -> None:
        """Read the tensors that `embed` needs.

        Raises:
            ModelError: a tensor is missing or not finite.
        """
        embedding = self._model.get_input_embeddings()
        embedding.weight = self._table(weights, self._family.embedding)
        if self._family.positions:
            self._put_positions(self._table(weights, self._family.positions))

    def read_head(self, weights: Weights) -> None:
        """Read the tensors that `logits` and `loss` need; a tied head is the embedding.

        Raises:
            ModelError: a tensor is missing or not finite.
        """
        head = self._model.get_output_embeddings()
        head.weight = self._table(weights, self._family.head_among(weights.names))
        if head.bias is not None:
            head.bias = self._table(weights, self._family.head.removesuffix("weight") + "bias")
        # A norm whose scale was folded into the head has no stored tensor.
        prefix = self._family.final_norm.removesuffix("weight")
        self._filled(self._norm, weights.stream_prefix(prefix))

    @property
    def head(self) -> nn.Parameter:
        """The matrix of the head, once it has been read."""
        found: nn.Parameter = self._model.get_output_embeddings().weight
        return found

    def tensors(self) -> list[Tensor]:
        """Return the weights that have been read; the shared table of a tied model once."""
        norm = [parameter for parameter in self._norm.parameters() if not parameter.is_meta]
        return [*self._tables.values(), *norm]

    def embed(
        self, ids: Int[Tensor, "batch tokens"], *, start: int = 0
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the input of the first layer for tokens at positions start, start + 1, ..."""
        trace = _Trace(end=1)
        self._run(trace, input_ids=ids.to(self._device), past_key_values=self._seen(start))
        return trace.calls[0][0]

    def layer_arguments(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        start: int = 0,
        cache: DynamicCache | None = None,
    ) -> list[dict[str, Any]]:
        """Return the keyword arguments of each layer beside its input.

        Args:
            hidden: any input of a layer, for tokens at positions start, start + 1, ...
            start: how many tokens came before.
            cache: of keys and values, which all layers of the caller fill; it has those of all
                tokens before, whatever their windows.
        """
        seen = None if cache is None else self._seen(start)
        trace = _Trace(end=len(self._stubs))
        self._run(trace, inputs_embeds=self._nothing(*hidden.shape[:2]), past_key_values=seen)
        return [
            {name: cache if value is seen else value for name, value in arguments.items()}
            for _, arguments in trace.calls
        ]

    def logits(self, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        """Return the logits, (batch, tokens, vocabulary), given the output of the last layer."""
        return self._logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)

    def loss(
        self, hidden: Float[Tensor, "batch tokens width"], ids: Int[Tensor, "batch tokens"]
    ) -> tuple[float, int]:
        """Return the summed nats of the next tokens, and their number.

        Logits are computed for `LOGIT_TOKENS` tokens at a time, to save memory.
        """
        return next_token_nll(hidden, self._logits, ids, block=LOGIT_TOKENS)

    def _logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        # As sequences of one token each: what follows the layers is the same for every token, and
        # masks and positions, which nothing reads here, are as small as they can be.
        trace = _Trace(end=len(self._stubs), output=hidden[:, None])
        logits: Tensor = self._run(trace, inputs_embeds=self._nothing(len(hidden), 1)).logits
        return logits[:, 0]

    def _run(
        self, trace: _Trace, *, past_key_values: DynamicCache | None = None, **inputs: Tensor
    ) -> Any:
        """Pass inputs through the model; return its output, None where the trace ends it."""
        for stub in self._stubs:
            stub.trace = trace
        cached = {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        try:
            return self._model(**inputs, **cached, return_dict=True)
        except _ReachedError:
            return None
        finally:
            for stub in self._stubs:
                del stub.trace  # and with it activations

    def _nothing(self, batch: int, tokens: int) -> Tensor:
        """Return an input of the layers, (batch, tokens, width), that takes no memory."""
        width = self._model.get_input_embeddings().weight.shape[1]
        zero = torch.zeros((), dtype=self._dtype, device=self._device)
        return zero.expand(batch, tokens, width)

    def _seen(self, tokens: int) -> DynamicCache:
        """Return a cache that tells how many tokens came before; what is in it is never read."""
        cache = DynamicCache()
        if tokens:
            nothing = torch.zeros(1, 1, tokens, 1, device=self._device)
            cache.update(nothing, nothing, 0)
        return cache

    def _table(self, weights: Weights, name: str) -> nn.Parameter:
        """Read a tensor, once even if it is both embedding and head."""
        if name not in self._tables:
            read = to_device(weights.read(name), self._device, self._dtype)
            self._tables[name] = nn.Parameter(read, requires_grad=False)
        return self._tables[name]

    def _put_positions(self, table: nn.Parameter) -> None:
        module, _, name = self._family.positions.rpartition(".")
        setattr(self._model.get_submodule(module), name, table)

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
