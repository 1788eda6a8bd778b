"""Refit o_proj and down_proj of compressed layers by least squares, one layer after the other.

Two residual streams pass the model layer by layer: X through the step's input model, which is the
dense one unless other steps came before, and Y through the compressed one. A linear that writes
into the residual stream is refitted so that Y, after it, comes as near to X as it can: first
o_proj, then down_proj after the refitted attention. All microbatches pass a half-layer before the
next half, and the sums over them are all that a solve needs. The last sequences are held out of the
sums: they choose the damping, and at the end decide whether the refitted model is used. For that a
third stream passes the layers as they were drafted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actors.layer_units.corrected_rounding import Rounder, corrected_half
from actors.layer_units.reads import Reads
from actors.layer_units.streams import (
    DENSE,
    DRAFTED,
    HALVES,
    REFITTED,
    Boundary,
    Streams,
    streams_after,
)
from actors.messages import CompressionJob, Done, UnitTask
from actors.modeling.halves import HalvedLayer
from actors.modeling.outer_model import OuterModel
from actors.numerics.least_squares import Refit, RestSums, empty_sums, refit
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.quantised import decoded
from actors.storage.tensors import read_tensors, require_finite, write_weights
from actors.storage.tokens import tokens_from_parquet
from planners.families import load as load_family
from planners.model.form import LayerForm
from planners.refit import RIDGES, cuts


def start(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Embed the tokens: all streams are equal there."""
    del task
    device = reads.device
    checkpoint = Checkpoint.of(job)
    outer = _outer(checkpoint, job, device)
    outer.read_embedding(checkpoint)
    ids = _ids(job, run, device)
    fitted, held = _cuts(job)

    def streams() -> Iterator[Streams]:
        for rows in (*fitted, *held):
            hidden = outer.embed(ids[slice(*rows)])
            names = (DENSE, REFITTED) if rows in fitted else (DENSE, REFITTED, DRAFTED)
            yield dict.fromkeys(names, hidden)

    return (), {"boundary": _boundary(0, job, run, device).write(streams())}


def layer(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Refit one layer, and pass the streams through it."""
    index, device = task.index, reads.device
    sites = [_boundary(site, job, run, device) for site in range(2 * index - 2, 2 * index + 3)]
    for spent in sites[:2] if index else ():
        spent.drop()  # the record of the layer before names its output by now
    family = load_family(job.shape.family)
    prefix = family.layer.format(i=index) + "."
    draft = read_tensors(run, f"draft/layer-{index:05d}.safetensors")
    drafted = {name.removeprefix(prefix): tensor for name, tensor in draft.items()}
    build = _Builder(job, index, device)
    layers = {DENSE: build.dense(prefix), DRAFTED: build.compressed(drafted)}
    rounder = Rounder(job, index, reads) if job.form.layers[index].schemes else None
    tensors, boundary = dict(drafted), []
    found: dict[str, dict[str, object]] = {}
    for half, here, after in zip(HALVES, sites[2:4], sites[3:], strict=True):
        if rounder is not None:
            found[half] = corrected_half(half, rounder, layers, build.of_values, here.fitted)
        else:
            found[half] = _refit_half(half, tensors, layers, build, here)
        boundary = after.write(streams_after(half, layers, here.all()))
    if rounder is not None:
        tensors = {name: tensor.cpu() for name, tensor in rounder.stored().items()}
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    for tensor in named.values():
        require_finite(tensor)
    entry, facts = write_weights(run, f"refit/layer-{index:05d}.safetensors", named)
    values: dict[str, object] = {
        "linears": found,
        "tensors": facts,
        "boundary": boundary,
    }
    return (entry,), values


def _refit_half(
    half: str,
    tensors: dict[str, Tensor],
    layers: dict[str, HalvedLayer],
    build: "_Builder",
    here: Boundary,
) -> dict[str, object]:
    """Refit the linear that ends a half-layer, in ``tensors`` and in the layer that is built."""
    family = load_family(build.job.shape.family)
    name = _weight_name(family.linears[half], tensors)
    layers[REFITTED] = build.compressed(tensors)
    found = refit(
        tensors[name].to(build.device),
        _sums(half, layers, name, here.fitted()),
        _sums(half, layers, name, here.held()),
        dampings=RIDGES,
        where=f"refit of {half}",
    )
    tensors[name] = found.weight.cpu()
    layers[REFITTED] = build.compressed(tensors)
    return _record(found)


def losses(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Measure the loss of each stream on the held-out sequences: the better of two is used."""
    device = reads.device
    boundary = _boundary(2 * task.index, job, run, device)
    checkpoint = Checkpoint.of(job)
    outer = _outer(checkpoint, job, device)
    outer.read_head(checkpoint)
    ids = _ids(job, run, device)
    nats = dict.fromkeys((DENSE, DRAFTED, REFITTED), 0.0)
    num_tokens = 0
    for rows, streams in zip(_cuts(job)[1], boundary.held(), strict=True):
        count = 0
        for name, hidden in streams.items():
            each, count = outer.loss(hidden, ids[slice(*rows)])
            nats[name] += each
        num_tokens += count
    values = {
        "nats": nats,
        "num_tokens": num_tokens,
        "used": nats[REFITTED] < nats[DRAFTED],
    }
    return (), values


class _Builder:
    """Builds one layer of the step's input model and of its result."""

    def __init__(self, job: CompressionJob, index: int, device: str) -> None:
        self.job, self.device = job, device
        self._index, self._checkpoint = index, Checkpoint.of(job)

    def dense(self, prefix: str) -> HalvedLayer:
        form = self._checkpoint.form.layers[self._index]
        return self._built(self._checkpoint.read_prefix(prefix), form)

    def compressed(self, tensors: Mapping[str, Tensor]) -> HalvedLayer:
        """Return the layer of tensors as they are stored."""
        form = self.job.form.layers[self._index]
        family = load_family(self.job.shape.family)
        schemes = {family.below_layer(name): scheme for name, scheme in form.schemes.items()}
        return self.of_values(decoded(tensors, schemes))

    def of_values(self, tensors: Mapping[str, Tensor]) -> HalvedLayer:
        """Return the layer of tensors none of which is quantised."""
        return self._built(tensors, replace(self.job.form.layers[self._index], schemes={}))

    def _built(self, tensors: Mapping[str, Tensor], form: LayerForm) -> HalvedLayer:
        return HalvedLayer(
            tensors,
            form,
            self._checkpoint.config,
            index=self._index,
            shape=self.job.shape,
            dtype=_dtype(self.job),
            device=self.device,
        )


def _sums(
    half: str, layers: Mapping[str, HalvedLayer], weight_name: str, microbatches: Iterator[Streams]
) -> RestSums:
    """Return the sums over microbatches of how the streams differ after a half-layer."""
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        inputs.append(args[0])

    linear = layers[REFITTED].module.get_submodule(weight_name.removesuffix(".weight"))
    weight: Any = linear.weight
    sums = empty_sums(weight.shape[1], weight.shape[0], device=str(weight.device))
    handle = linear.register_forward_pre_hook(keep)
    for streams in microbatches:
        add, shortcut = HALVES[half]
        x, y = streams[DENSE], streams[REFITTED]
        added, got = add(layers[DENSE], x), add(layers[REFITTED], y)
        x, y = shortcut(layers[DENSE], x), shortcut(layers[REFITTED], y)
        # Differences first: what is equal cancels exactly, whatever the size of the stream.
        rest = (x.float() - y.float()) + (added.float() - got.float())
        sums.add(inputs.pop().flatten(0, -2), rest.flatten(0, -2))
    handle.remove()
    return sums


def _weight_name(linear: str, tensors: Mapping[str, Tensor]) -> str:
    """Return what of a linear is refitted: its weight, or the second of two factors."""
    second = f"{linear}.second.weight"
    return second if second in tensors else f"{linear}.weight"


def _record(found: Refit) -> dict[str, object]:
    return {
        "damping": found.damping,
        "rest_before": found.before,
        "rest_after": found.after,
        "rungs": found.rungs,
    }


def _boundary(site: int, job: CompressionJob, run: Directory, device: str) -> Boundary:
    fitted, held = _cuts(job)
    return Boundary(run=run, site=site, num_fitted=len(fitted), num_held=len(held), device=device)


def _outer(checkpoint: Checkpoint, job: CompressionJob, device: str) -> OuterModel:
    family = load_family(job.shape.family)
    return OuterModel(checkpoint.config, family, dtype=_dtype(job), device=device)


def _cuts(job: CompressionJob) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return cuts(job.batching.sequences, size=job.batching.microbatch_sequences)


def _ids(job: CompressionJob, run: Directory, device: str) -> Tensor:
    return torch.from_numpy(tokens_from_parquet(run.read(job.tokens))).to(device)


def _dtype(job: CompressionJob) -> torch.dtype:
    found: torch.dtype = getattr(torch, job.batching.dtype)
    return found
