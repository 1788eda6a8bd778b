"""The damage of quantised modules of one layer: each width with each scheme, and of both tables.

A module is cut to a width once, and rounded by all schemes side by side, on the Gram matrices that
are carried behind the cut. The layer with the rounded module is compared with the uncut one on the
probe, as for a cut alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from actors import methods
from actors.messages import CompressionJob
from actors.methods.gptq import input_gram
from actors.modeling.halves import HalvedLayer
from actors.modeling.outer_model import OuterModel
from actors.numerics.rounding import (
    Factor,
    factor_of,
    round_columns,
    round_to_nearest,
    scale_dtype,
)
from actors.storage.checkpoint import Checkpoint
from planners.budget.joint import table_schemes
from planners.families import load as load_family
from planners.memory.peaks import ROUNDED_AT_ONCE
from planners.method import Ladder
from planners.model.cost import matrices
from planners.model.form import LayerForm
from planners.model.modules import LINEARS_OF
from planners.model.scheme import Scheme
from planners.model.stored_bytes import EMBEDDING, HEAD
from planners.model.taps import input_of, of_one_input

TABLE_TOKENS = 512  # on which the damage to logits is measured
Weights = Mapping[str, Tensor]


def quantised_levels(
    ladders: Mapping[str, Ladder],
) -> Iterator[tuple[str, int, dict[str, Ladder]]]:
    """Yield module, size, and the ladders by name that measure it, the largest size first."""
    by_module: dict[str, dict[str, Ladder]] = {}
    for name, ladder in ladders.items():
        if ladder.scheme is not None:
            by_module.setdefault(ladder.module, {})[name] = ladder
    for module, own in by_module.items():
        sizes = {size for ladder in own.values() for size in ladder.levels}
        for size in sorted(sizes, reverse=True):
            yield module, size, {n: each for n, each in own.items() if size in each.levels}


class Rounding:
    """Rounds modules of one layer; what serves several of them is factored once."""

    def __init__(
        self, weights: Weights, sums: Weights, job: CompressionJob, start: LayerForm
    ) -> None:
        """Keep the layer; ``sums`` are its statistics."""
        self._weights, self._sums, self._job, self._start = weights, sums, job, start
        self._factors: dict[str, Factor] = {}

    def narrowed(
        self, ladder: Ladder, size: int, factored: dict[str, Any]
    ) -> tuple[LayerForm, dict[str, Tensor], dict[str, Tensor]]:
        """Return the layer with a module cut to a size, nothing rounded, and its statistics."""
        form = replace(ladder.cut(self._start, size), schemes={})
        if form == self._start or methods.spec(self._job.method).quantises:
            return form, dict(self._weights), dict(self._sums)
        carried: dict[str, Tensor] = {}
        new, _ = methods.load(self._job.method).compress(
            self._weights, self._sums, shape=self._job.shape, form=form,
            options=self._job.options, factored=factored, carried=carried,
        )  # fmt: skip
        return form, new, {**self._sums, **carried}

    def rounded(
        self,
        module: str,
        schemes: Mapping[str, LayerForm],
        new: Weights,
        sums: Weights,
        form: LayerForm,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the name of each ladder with matrix -> its weights after rounding.

        Args:
            module: that is rounded.
            schemes: name of a ladder -> the layer as it stores it.
            new: tensors of the layer, cut.
            sums: its statistics, carried behind the cut.
            form: of the layer, without schemes.
        """
        own_names = (name for name in matrices(self._job.shape, form)
                     if name.partition(".")[0] in LINEARS_OF[module])  # fmt: skip
        together = of_one_input(own_names)
        num_weights = sum(new[f"{name}.weight"].numel() for names in together for name in names)
        own: dict[str, Factor] = {}  # of the inputs that this cut leaves
        for ladders in _chunks(list(schemes), max(1, ROUNDED_AT_ONCE // num_weights)):
            found: dict[str, dict[str, Tensor]] = {ladder: {} for ladder in ladders}
            for names in together:
                factor = self._factor(names[0], new, sums, own)
                every = [(ladder, name) for ladder in ladders for name in names]
                rows = [(new[f"{n}.weight"], schemes[ladder].schemes[n]) for ladder, n in every]
                stored = scale_dtype(rows[0][0].dtype)
                rounded = round_columns(rows, factor, stored=stored)
                for (ladder, name), each in zip(every, rounded, strict=True):
                    found[ladder][name] = each.values()
            yield from found.items()

    def _factor(self, name: str, new: Weights, sums: Weights, own: dict[str, Factor]) -> Factor:
        key = input_of(name)
        gram = f"{key}.gram"
        known = self._factors if gram in sums and sums[gram] is self._sums[gram] else own
        if key not in known:
            known[key] = factor_of(input_gram(name, new, sums), where=key)
        return known[key]


def place(layer: HalvedLayer, values: Mapping[str, Tensor], job: CompressionJob) -> None:
    """Give a layer other weights, by the names of their matrices."""
    family = load_family(job.shape.family)
    for name, tensor in values.items():
        linear: Any = layer.module.get_submodule(family.below_layer(name))
        linear.weight.data.copy_(tensor)


def table_damages(
    index: int, probe: Tensor, output: Tensor, checkpoint: Checkpoint, job: CompressionJob
) -> dict[str, dict[str, float]]:
    """Return the damage of each scheme of the embedding, or of the head, where they are beside.

    Of the embedding: the relative error of its rows for the probe's tokens, before the first layer.
    Of the head: that of the logits after the last one, apart from what all tokens have in common.
    """
    shape, found = job.shape, {}
    schemes = table_schemes(shape)
    if index == 0:
        rows = probe.flatten(0, 1)
        energy = rows.float().square().sum(-1)
        found[EMBEDDING] = {
            bits: float(((_nearest(rows, scheme) - rows.float()).square().sum(-1) / energy).mean())
            for bits, scheme in schemes.items()
        }
    if index == shape.num_layers - 1:
        found[HEAD] = _head_damages(output, checkpoint, schemes)
    return found


def _head_damages(
    output: Tensor, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]
) -> dict[str, float]:
    family = load_family(checkpoint.shape.family)
    outer = OuterModel(checkpoint.config, family, dtype=output.dtype, device=str(output.device))
    outer.read_head(checkpoint)
    hidden = output.flatten(0, 1)[None, :TABLE_TOKENS]
    whole = _centred(outer.logits(hidden))
    energy = whole.square().sum(-1)
    head, found = outer.head, {}
    for bits, scheme in schemes.items():
        rounded = torch.cat([_nearest(rows, scheme) for rows in torch.split(head.data, 8192)])
        kept, head.data = head.data, rounded.to(head.dtype)
        change = _centred(outer.logits(hidden)).sub_(whole)
        head.data = kept
        found[bits] = float((change.square().sum(-1) / energy).mean())
    return found


def _centred(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits - logits.mean(-1, keepdim=True)


def _nearest(rows: Tensor, scheme: Scheme) -> Tensor:
    every = torch.ones(rows.shape[1], device=rows.device)
    return round_to_nearest(rows, every, scheme, stored=scale_dtype(rows.dtype)).values()


def _chunks(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for first in range(0, len(names), size):
        yield names[first : first + size]
