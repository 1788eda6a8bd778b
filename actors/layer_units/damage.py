"""The sensitivity of one layer: the damage that each cut of each of its modules does.

The probe's activations go through the layer as it is in the step's input model, and through the
layer with one module cut. The damage of a cut is the mean over tokens of ``|y' - y|^2 / |y|^2``, y
and y' the residual streams that leave the two layers. Only the cut module and what follows it in
the layer is recomputed. With ``damage=loss`` it is the rise of the input model's loss where this
one layer is cut: every y' goes through all later layers of that model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actors import methods
from actors.layer_units.model_loss import downstream_losses
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask
from actors.modeling.halves import HalvedLayer
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tokens import tokens_from_parquet
from planners.budget.served import PAIR_SCALES, PAIRS
from planners.errors import NumericsError
from planners.families import load as load_family
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

    Raises:
        NumericsError: a cut gives no finite output.
    """
    shape = job.shape
    probe = sums["probe"].to(device)
    start = checkpoint.form.layers[index]
    halved = partial(halved_layer, checkpoint=checkpoint, index=index, probe=probe)
    whole = halved(weights, start)
    serial = not shape.kind(start).parallel
    middle, output = whole.residual_mid(probe), whole.output(probe)
    energy = output.float().square().sum(-1)  # (sequences, tokens)
    curves: Curves = {}
    cuts: list[tuple[str, int, Tensor]] = []
    for module, ladder in methods.spec(job.method).ladders(shape, start, job.options).items():
        factored: dict[str, Any] = {}  # once for all levels of a module
        curves[module] = [[ladder.whole, 0.0]]
        for size in ladder.levels:
            form, given = ladder.cut(start, size), sums
            if module == PAIRS:
                form = replace(form, pairs=tuple(sorted(job.pair_order[: size // 2])))
                given = {**sums, PAIR_SCALES: whole.score_scales(probe, form.pairs)}
            new, _ = methods.load(job.method).compress(
                weights, given, shape=shape, form=form, options=job.options, factored=factored
            )
            cut = halved(new, form)
            # Attention is not touched by a cut of the MLP, so the residual before it stands.
            after = cut.after_mlp(middle) if module == "mlp" and serial else cut.output(probe)
            if losses is not None:
                cuts.append((module, size, after))  # they pass the later layers together
                continue
            lost = (after.float() - output.float()).square().sum(-1) / energy
            curves[module].append(_level(module, size, float(lost.double().mean())))
    if losses is not None:
        uncut, *found = losses([output, *(after for _, _, after in cuts)])
        for (module, size, _), loss in zip(cuts, found, strict=True):
            curves[module].append(_level(module, size, loss - uncut))
    return curves


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
        tokens = tokens_from_parquet(run.read(job.tokens))[: len(sums["probe"])]
        ids = torch.from_numpy(tokens).to(device)
        losses = partial(downstream_losses, checkpoint, task.index, ids=ids, device=device)
    curves = damage_curves(
        weights, sums, checkpoint, job=job, index=task.index, device=device, losses=losses
    )
    return (), {"curves": curves}
