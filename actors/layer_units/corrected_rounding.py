"""Round a layer again, on what the rounded layers before it leave of its inputs.

The second pass of `actors.layer_units.refit`, where the result is quantised. With X the inputs of a
linear in the step's input model, Y those in the rounded one, and ``C = Y^T (X - Y)``, the real
weights that come nearest to ``X W`` are ``W + (Y^T Y + r I)^-1 C W``; they are rounded on ``Y^T Y``
(the objective of GPTAQ, arXiv:2504.02692, and Qronos, arXiv:2505.11695, solved exactly). A linear
that writes into the residual stream also makes up for a part of the error that is in the stream
already. Layer after layer: corrected all at once, the layers make the result far worse.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from actors.layer_units.layer import cut
from actors.layer_units.reads import Reads
from actors.layer_units.streams import DENSE, HALVES, REFITTED, Streams
from actors.messages import CompressionJob
from actors.modeling.halves import HalvedLayer
from actors.numerics.least_squares import RestSums, empty_sums, least_squares_step
from actors.numerics.packed import congruence
from actors.numerics.packing import parts_of
from actors.numerics.rounding import factor_of, round_columns, scale_dtype
from planners.families import load as load_family
from planners.model.cost import matrices
from planners.refit import ROUNDING_RIDGES, STREAM_SHARE

Build = Callable[[Mapping[str, Tensor]], HalvedLayer]
READERS = {"o_proj": ("q_proj", "k_proj", "v_proj"), "down_proj": ("gate_proj", "up_proj")}
Layers = dict[str, HalvedLayer]
Passes = Callable[[], Iterator[Streams]]


class Rounder:
    """The matrices of one layer while they are rounded.

    Attributes:
        values: tensor below the layer -> its numbers now, from which the layer is built.
    """

    def __init__(self, job: CompressionJob, index: int, reads: Reads) -> None:
        """Read the layer and cut it again, as its draft was before it was rounded."""
        self._family = load_family(job.shape.family)
        self._form = job.form.layers[index]
        self._matrices = matrices(job.shape, self._form)
        weights, sums = reads.weights(job, index), reads.statistics(job, index)
        new, _, _ = cut(weights, sums, job, index, reads)
        dtype = getattr(torch, job.form.dtype or job.shape.dtype)
        self._stored = scale_dtype(dtype)
        self.residual_scale = job.shape.kind(self._form).residual_scale
        self._before = {name: new[f"{name}.weight"] for name in self._form.schemes}
        self._parts: dict[str, Tensor] = {}
        self.values = {}
        for name, tensor in new.items():
            rounded = name.removesuffix(".weight") in self._form.schemes
            whole = rounded or not tensor.is_floating_point()
            self.values[self._family.below_layer(name)] = tensor if whole else tensor.to(dtype)

    def of(self, roles: Sequence[str]) -> list[str]:
        """Return the matrices of some linears, of which all or none are rounded."""
        return [name for name in self._matrices if name.partition(".")[0] in roles]

    def rounds(self, name: str) -> bool:
        """Return whether a matrix is rounded."""
        return name in self._form.schemes

    def module(self, name: str) -> str:
        """Return where a matrix is in the layer."""
        return self._family.below_layer(name)

    def before(self, name: str) -> Tensor:
        """Return a matrix before rounding, in float64."""
        return self._before[name].to(torch.float64)

    def value(self, name: str) -> Tensor:
        """Return a matrix as it is now, in float64."""
        return self.values[f"{self.module(name)}.weight"].to(torch.float64)

    def take(self, weights: Mapping[str, Tensor], gram: Tensor) -> list[str]:
        """Round matrices that read the same inputs; return rungs that needed extra damping."""
        factor = factor_of(gram, where=", ".join(weights))
        rows = [(weight, self._form.schemes[name]) for name, weight in weights.items()]
        rounded = round_columns(rows, factor, stored=self._stored)
        for name, each in zip(weights, rounded, strict=True):
            below = self.module(name)
            self.values[f"{below}.weight"] = each.values()
            parts = parts_of(each, self._stored)
            self._parts |= {f"{below}.{part}": tensor for part, tensor in parts.items()}
        return [] if factor.rung == "cholesky" else [factor.rung]

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors of the layer as they are stored."""
        numbers = {f"{self.module(name)}.weight" for name in self._form.schemes}
        return {n: t for n, t in self.values.items() if n not in numbers} | self._parts


def corrected_half(
    half: str, rounder: Rounder, layers: Layers, build: Build, passes: Passes
) -> dict[str, object]:
    """Round the linears of a half-layer: those that read its input, then the one that ends it.

    Args:
        half: ``o_proj`` or ``down_proj``, the linear that ends it.
        rounder: of the layer.
        layers: by stream; the rounded one is built anew.
        build: tensors below the layer -> the layer.
        passes: returns the microbatches to fit to.

    Returns:
        What a record says of it: the squared difference between the streams behind the half before
        and after the last linear is rounded, and rungs that needed extra damping.
    """
    layers[REFITTED] = build(rounder.values)
    rungs = _round_readers(half, rounder, layers, passes())
    layers[REFITTED] = build(rounder.values)
    found = _round_writer(half, rounder, layers, passes())
    layers[REFITTED] = build(rounder.values)
    before, after = found
    return {"damping": ROUNDING_RIDGES[0], "rest_before": before, "rest_after": after,
            "rungs": rungs}  # fmt: skip


def _round_readers(
    half: str, rounder: Rounder, layers: Layers, microbatches: Iterator[Streams]
) -> list[str]:
    names = [name for name in rounder.of(READERS[half]) if rounder.rounds(name)]
    firsts = [name for name in names if not name.endswith(".second")]
    if not names:
        return []
    role = firsts[0].partition(".")[0]
    places = {DENSE: rounder.module(role), REFITTED: rounder.module(firsts[0])}
    sums: RestSums | None = None
    add, _ = HALVES[half]
    with _inputs({stream: (layers[stream], place) for stream, place in places.items()}) as seen:
        for streams in microbatches:
            for stream in places:
                add(layers[stream], streams[stream])
            x, y = (seen[stream].flatten(0, -2) for stream in (DENSE, REFITTED))
            sums = sums or empty_sums(y.shape[1], x.shape[1], device=str(y.device))
            sums.add(y, x.float() - y.float())
    assert sums is not None  # there are microbatches
    weights = torch.cat([rounder.before(name) for name in firsts])
    own = RestSums(gram=sums.gram, cross=sums.cross @ weights.T, energy=sums.energy)
    weights += _step(own, ROUNDING_RIDGES[0], ", ".join(firsts))
    parts = torch.split(weights, [len(rounder.before(name)) for name in firsts])
    wanted = dict(zip(firsts, parts, strict=True))
    rungs = rounder.take(wanted, sums.gram)
    for name in names:
        if name not in firsts:
            first = rounder.value(f"{name.removesuffix('second')}first")
            rungs += rounder.take({name: rounder.before(name)}, congruence(first, sums.gram))
    return rungs


def _round_writer(
    half: str, rounder: Rounder, layers: Layers, microbatches: Iterator[Streams]
) -> tuple[float, float]:
    names = rounder.of((half,))
    last = names[-1]
    if not rounder.rounds(last):
        return 0.0, 0.0
    out_dim, dim = rounder.value(last).shape
    device = str(rounder.value(last).device)
    less, lacks = empty_sums(dim, out_dim, device=device), empty_sums(0, 0, device=device)
    stream_cross = torch.zeros_like(less.cross)
    if len(names) > 1:  # its first factor, on what it reads
        lacks = empty_sums(rounder.value(names[0]).shape[1], 0, device=device)
    add, shortcut = HALVES[half]
    energy = 0.0
    with _inputs({name: (layers[REFITTED], rounder.module(name)) for name in names}) as seen:
        for streams in microbatches:
            x, y = streams[DENSE], streams[REFITTED]
            added = add(layers[DENSE], x).float() - add(layers[REFITTED], y).float()
            stream = shortcut(layers[DENSE], x).float() - shortcut(layers[REFITTED], y).float()
            added, stream = (
                each.flatten(0, -2) / rounder.residual_scale for each in (added, stream)
            )
            z = seen[last].flatten(0, -2).float()
            less.add(z, added)
            stream_cross.add_(z.T @ stream)
            energy += float((added + stream).square().sum(dtype=torch.float64))
            if len(names) > 1:
                first_inputs = seen[names[0]].flatten(0, -2)
                lacks.add(first_inputs, first_inputs[:, :0])
    if len(names) > 1:
        rounder.take({names[0]: rounder.before(names[0])}, lacks.gram)
    old = rounder.before(last)
    own = RestSums(gram=less.gram, cross=stream_cross, energy=less.energy)
    wanted = old + _step(less, ROUNDING_RIDGES[0], last)
    wanted += STREAM_SHARE * _step(own, ROUNDING_RIDGES[1], last)
    rounder.take({last: wanted}, less.gram)
    whole = RestSums(
        gram=less.gram,
        cross=less.cross + stream_cross,
        energy=torch.tensor([energy], dtype=torch.float64, device=less.gram.device),
    )
    return energy, whole.left((rounder.value(last) - old).T)


def _step(sums: RestSums, damping: float, name: str) -> Tensor:
    step, _ = least_squares_step(sums, damping=damping, where=f"correction of {name}")
    return step.T


@contextmanager
def _inputs(places: Mapping[str, tuple[HalvedLayer, str]]) -> Iterator[dict[str, Tensor]]:
    """Keep the latest input of modules of layers, by a name of each."""
    seen: dict[str, Tensor] = {}

    def kept(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.update({name: inputs[0]})

    handles = [
        layer.module.get_submodule(place).register_forward_pre_hook(kept(name))
        for name, (layer, place) in places.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
