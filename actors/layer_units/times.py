"""How long a layer of each width takes under the load that a result is made for.

A layer of random weights is run as users run it: a prompt at once, or one token behind the keys and
values of a prompt. The widths are those at which damage is measured. MLP and attention are timed
apart, and all but the layers once; no calibration data is needed.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from actors import methods
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask
from actors.modeling.halves import HalvedLayer, one_layer_config
from actors.modeling.outer_model import OuterModel, empty_model
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from planners.budget.widths import cut_layer, layer_widths
from planners.families import load as load_family
from planners.model.form import LayerForm
from planners.model.serving_load import DECODE, ServingLoad

SPREAD = 0.02  # of random weights: activations stay finite in every dtype
ENOUGH, LIMIT, FEWEST = 0.15, 3.0, 5  # seconds to time one width, at most, and rounds at least


def times(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Return the seconds of MLP and attention at each width, and of the rest of the model."""
    del task, run  # the same for all layers, and nothing is written
    assert job.load is not None  # the driver plans such a unit for a load only
    checkpoint = reads.checkpoint(job)
    start = checkpoint.form.layers[0]
    ladders = methods.spec(job.method).ladders(job.shape, start, job.options)
    timer = _Timer(checkpoint, job.load, reads.device)
    full = layer_widths(start)
    found = {}
    for name, module in (("mlp", "mlp"), ("heads", "qk")):
        widths = {full[module], *(ladders[module].levels if module in ladders else ())}
        forms = {
            width: cut_layer(start, full | dict.fromkeys(CUT[name], width))
            for width in sorted(widths)
        }
        measured = timer.seconds({w: timer.half(name, form) for w, form in forms.items()})
        found[name] = [[width, seconds] for width, seconds in measured.items()]
    outside = timer.seconds({0: timer.outside()})[0]
    return (), {"times": {**found, "outside": outside}}


CUT = {"mlp": ("mlp",), "heads": ("qk", "vo")}


class _Timer:
    """Runs parts of a model of random weights under one load."""

    def __init__(self, checkpoint: Checkpoint, load: ServingLoad, device: str) -> None:
        self._checkpoint, self._load, self._device = checkpoint, load, device
        self._dtype = getattr(torch, checkpoint.dtype)
        self._tokens = 1 if load.phase == DECODE else load.context
        self._generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def seconds(self, calls: dict[int, Callable[[], Any]]) -> dict[int, float]:
        """Return the median time of each call; they take turns, so that all see one machine."""
        rounds: dict[int, list[float]] = {key: [] for key in calls}
        for call in calls.values():
            call()  # the first is slower
        begun = time.perf_counter()
        while True:
            for key, call in calls.items():
                self._synchronise()
                started = time.perf_counter()
                call()
                self._synchronise()
                rounds[key].append(time.perf_counter() - started)
            spent = time.perf_counter() - begun
            many = len(next(iter(rounds.values()))) >= FEWEST
            if spent > LIMIT * len(calls) or (many and spent > ENOUGH * len(calls)):
                return {key: statistics.median(found) for key, found in rounds.items()}

    def half(self, name: str, form: LayerForm) -> Callable[[], Any]:
        """Return a call of the MLP, or of attention, of a layer."""
        checkpoint = self._checkpoint
        shape = checkpoint.shape
        alone = one_layer_config(checkpoint.config, form, shape, 0)
        prefix = load_family(shape.family).layer.format(i=0)
        bare = empty_model(alone).get_submodule(prefix).state_dict()
        tensors = {key: self._random(key, tensor) for key, tensor in bare.items()}
        layer = HalvedLayer(
            tensors, form, checkpoint.config, index=0, shape=shape, dtype=self._dtype,
            device=self._device,
        )  # fmt: skip
        hidden = self._hidden(form.residual_in)
        if name == "mlp":
            return lambda: layer.mlp(hidden)
        cache = self._cache(form) if self._load.phase == DECODE else None
        arguments = layer.arguments(hidden, cache=cache)

        def attend() -> Tensor:
            attended = layer.attention(hidden, arguments)
            if cache is not None:
                cache.crop(-1)  # the token that was just added
            return attended

        return attend

    def outside(self) -> Callable[[], Any]:
        """Return a call of all but the layers; a prompt gets the logits of its last token."""
        checkpoint = self._checkpoint
        shape, config = checkpoint.shape, dict(checkpoint.config)
        outer = OuterModel(
            config, load_family(shape.family), dtype=self._dtype, device=self._device
        )
        outer.read_embedding(checkpoint)
        outer.read_head(checkpoint)
        ids = torch.zeros(self._load.batch, self._tokens, dtype=torch.int64)
        start = self._load.context if self._load.phase == DECODE else 0

        def call() -> Tensor:
            hidden = outer.embed(ids, start=start)
            return outer.logits(hidden[:, -1:])

        return call

    def _hidden(self, width: int) -> Tensor:
        size = (self._load.batch, self._tokens, width)
        return torch.randn(size, generator=self._generator).to(self._device, self._dtype)

    def _cache(self, form: LayerForm) -> DynamicCache:
        """Return the keys and values of a prompt."""
        heads, load = self._checkpoint.shape.num_kv_heads, self._load
        keys, values = (
            torch.randn(load.batch, heads, load.context, width, generator=self._generator)
            for width in (form.qk_head_dim, form.vo_head_dim)
        )
        cache = DynamicCache()
        cache.update(*(x.to(self._device, self._dtype) for x in (keys, values)), 0)
        return cache

    def _random(self, name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():  # the rope pairs of each head: any will do
            return torch.arange(like.shape[1]).repeat(like.shape[0], 1)
        drawn = torch.randn(like.shape, generator=self._generator).mul_(SPREAD)
        return drawn + 1 if name.endswith("norm.weight") else drawn

    def _synchronise(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
