"""The sensitivity of one layer: the damage that each cut of each of its modules does.

The probe's activations go through the layer as it is in the step's input model, and through the
layer with one module cut. The damage of a cut is the mean over tokens of ``|y' - y|^2 / |y|^2``, y
and y' the residual streams that leave the two layers. Only the cut module and what follows it in
the layer is recomputed. With ``damage=loss`` it is the rise of the input model's loss where this
one layer is cut: every y' goes through all later layers of that model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actors import methods
from actors.layer_units.model_loss import downstream_losses
from actors.layer_units.reads import Reads
from actors.layer_units.rounding_damage import (
    Rounding,
    place,
    quantised_levels,
    table_damages,
)
from actors.layer_units.sharing import SharingLayers, sources_of
from actors.messages import CompressionJob, Done, UnitTask
from actors.methods._neighbours import Neighbours
from actors.modeling.halves import HalvedLayer
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tokens import tokens_from_parquet
from planners.budget.schemes import ROUNDED_TOKENS, SCHEMES
from planners.budget.served import PAIR_SCALES, PAIRS
from planners.errors import NumericsError
from planners.families import load as load_family
from planners.method import Ladder
from planners.model.form import LayerForm

Curves = dict[str, list[list[float]]]
Losses = Callable[[list[Tensor]], list[float]]


@torch.inference_mode()
def damage_curves(  # noqa: PLR0913 a layer, and where it stands
    weights: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    *,
    job: CompressionJob,
    index: int,
    device: str,
    losses: Losses | None = None,
    neighbours: Neighbours | None = None,
) -> Curves:
    """Return module -> [[size, damage], ...] for one layer, the largest size first.

    A size is one of the method's ladder, a width or a sum of ranks; the largest, the uncut module,
    has damage 0.

    Args:
        weights: role -> tensor of the layer.
        sums: its statistics and its probe, (sequences, tokens, width of the residual stream).
        checkpoint: the step's input model.
        job: method, options and shape.
        index: of the layer.
        device: where to compute.
        losses: outputs of the layer -> the model's loss with each, whose rise is the damage. None:
            damage is the relative error of the layer's output.
        neighbours: the layers with which it may share tensors, for a method that does so.

    Raises:
        NumericsError: a cut gives no finite output.
    """
    start = checkpoint.form.layers[index]
    ladders = methods.spec(job.method).ladders(job.shape, start, job.options)
    probe = _probe(sums, ladders).to(device)
    uncut = _Uncut(weights, probe, checkpoint=checkpoint, index=index)
    curves: Curves = {
        name: [] if ladder.scheme else [[ladder.whole, 0.0]] for name, ladder in ladders.items()
    }
    cuts: list[tuple[str, int, Tensor]] = []
    for name, size, after in _outputs(weights, sums, uncut, ladders, job, neighbours):
        if losses is not None:
            cuts.append((name, size, after))  # they pass the later layers together
        else:
            curves[name].append(_level(name, size, uncut.lost(after)))
    if losses is not None:
        loss, *found = losses([uncut.output, *(after for _, _, after in cuts)])
        for (name, size, _), own in zip(cuts, found, strict=True):
            curves[name].append(_level(name, size, own - loss))
    return curves


class _Uncut:
    """The layer as it is in the step's input model, with the probe that has passed it.

    Attributes:
        layer: itself.
        probe: its input.
        output: of the probe.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], probe: Tensor, *, checkpoint: Checkpoint, index: int
    ) -> None:
        self.start = checkpoint.form.layers[index]
        self.built = partial(halved_layer, checkpoint=checkpoint, index=index, probe=probe)
        self.layer, self.probe = self.built(weights, self.start), probe
        self._serial = not checkpoint.shape.kind(self.start).parallel
        self._middle, self.output = self.layer.residual_mid(probe), self.layer.output(probe)
        self._energy = self.output.float().square().sum(-1)  # (sequences, tokens)

    def through(self, cut: HalvedLayer, module: str) -> Tensor:
        """Return the output of a layer of which one module is cut."""
        # Attention is not touched by a cut of the MLP, so the residual before it stands.
        after_attention = module == "mlp" and self._serial
        return cut.after_mlp(self._middle) if after_attention else cut.output(self.probe)

    def lost(self, after: Tensor) -> float:
        """Return how far another output is from the layer's own."""
        lost = (after.float() - self.output.float()).square().sum(-1) / self._energy
        return float(lost.double().mean())


def _outputs(
    weights: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    uncut: _Uncut,
    ladders: Mapping[str, Ladder],
    job: CompressionJob,
    neighbours: Neighbours | None,
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the name of a ladder, a size of it, and the layer's output with that cut alone."""
    shared = {"neighbours": neighbours} if methods.spec(job.method).shares else {}
    start, factors = uncut.start, dict[str, dict[str, Any]]()  # what serves all sizes of a module
    for module, ladder in ladders.items():
        for size in ladder.levels if ladder.scheme is None else ():
            form, given = ladder.cut(start, size), sums
            if module == PAIRS:
                form = replace(form, pairs=tuple(sorted(job.pair_order[: size // 2])))
                scales = uncut.layer.score_scales(uncut.probe, form.pairs)
                given = {**sums, PAIR_SCALES: scales}
            factored = factors.setdefault(module, {})
            new, _ = methods.load(job.method).compress(
                weights,
                given,
                shape=job.shape,
                form=form,
                options=job.options,
                factored=factored,
                **shared,
            )
            if neighbours is not None:
                new |= sources_of(form, neighbours)
            yield module, size, uncut.through(uncut.built(new, form), module)
    rounding = Rounding(weights, sums, job, start)
    for module, size, own in quantised_levels(ladders):
        some = next(iter(own.values()))
        form, new, carried = rounding.narrowed(some, size, factors.setdefault(module, {}))
        stored = {name: ladder.cut(start, size) for name, ladder in own.items()}
        cut = uncut.built(new, form)
        for name, values in rounding.rounded(module, stored, new, carried, form):
            place(cut, values, job)
            yield name, size, uncut.through(cut, module)


def _probe(sums: Mapping[str, Tensor], ladders: Mapping[str, Ladder]) -> Tensor:
    """Return the activations on which damage is measured: fewer where there are many levels."""
    probe = sums["probe"]
    if all(ladder.scheme is None for ladder in ladders.values()):
        return probe
    return probe[: max(1, ROUNDED_TOKENS // probe.shape[1])]


def _level(module: str, size: int, damage: float) -> list[float]:
    if not math.isfinite(damage):
        raise NumericsError(f"{module} cut to {size}: the damage is not finite")
    return [size, damage]


def halved_layer(
    weights: Mapping[str, Tensor],
    form: LayerForm,
    *,
    checkpoint: Checkpoint,
    index: int,
    probe: Tensor,
) -> HalvedLayer:
    """Return the layer of these tensors, which are named by their roles."""
    shape = checkpoint.shape
    family = load_family(shape.family)
    tensors = {family.below_layer(role): tensor for role, tensor in weights.items()}
    return HalvedLayer(
        tensors,
        form,
        checkpoint.config,
        index=index,
        shape=shape,
        dtype=probe.dtype,
        device=str(probe.device),
    )


def damage(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Measure the damage of all cuts of one layer; the curves are values, no file is written."""
    checkpoint, device = reads.checkpoint(job), reads.device
    weights = reads.weights(job, task.index)
    sums = reads.statistics(job, task.index)
    losses = None
    if job.options.get("damage") == "loss":
        # The probe is the first sequences of the calibration tokens.
        ladders = methods.spec(job.method).ladders(
            job.shape, checkpoint.form.layers[task.index], job.options
        )
        tokens = tokens_from_parquet(run.read(job.tokens))[: len(_probe(sums, ladders))]
        ids = torch.from_numpy(tokens).to(device)
        losses = partial(downstream_losses, checkpoint, task.index, ids=ids, device=device)
    curves = damage_curves(
        weights,
        sums,
        checkpoint,
        job=job,
        index=task.index,
        device=device,
        losses=losses,
        neighbours=SharingLayers(task.index, job, run, reads),
    )
    found: dict[str, object] = {"curves": curves}
    if SCHEMES.name in job.options:
        found["tables"] = tables(sums, weights, checkpoint, job, task.index, device)
    return (), found


@torch.inference_mode()
def tables(
    sums: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    job: CompressionJob,
    index: int,
    device: str,
) -> dict[str, dict[str, float]]:
    """Return the damage of schemes of the table that is beside a layer, if there is one."""
    if index not in (0, job.shape.num_layers - 1):
        return {}
    probe = sums["probe"].to(device)[:1]
    form = checkpoint.form.layers[index]
    whole = halved_layer(weights, form, checkpoint=checkpoint, index=index, probe=probe)
    return table_damages(index, probe, whole.output(probe), checkpoint, job)
