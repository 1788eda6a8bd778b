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

from actors import methods
from actors.layer_units.layer import cut
from actors.layer_units.reads import Reads
from actors.layer_units.streams import DENSE, HALVES, REFITTED, Streams
from actors.messages import CompressionJob
from actors.modeling.halves import HalvedLayer
from actors.numerics.gram import accumulate
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
UNDAMPED = "cholesky"  # the rung of a factor that needed no more damping than usual
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
        # A method that only rounds cuts nothing, so it needs no statistics here.
        sums = {} if methods.spec(job.method).quantises else reads.statistics(job, index)
        new, _, _ = cut(reads.weights(job, index), sums, job, index, reads)
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
        """Return the matrices of some linears, rounded or not."""
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

    def take(self, weights: Mapping[str, Tensor], gram: Tensor) -> str:
        """Round matrices that read the same inputs; return the rung of the factor of these."""
        factor = factor_of(gram, where=", ".join(weights))
        rows = [(weight, self._form.schemes[name]) for name, weight in weights.items()]
        rounded = round_columns(rows, factor, stored=self._stored)
        for name, each in zip(weights, rounded, strict=True):
            below = self.module(name)
            self.values[f"{below}.weight"] = each.values()
            parts = parts_of(each, self._stored)
            self._parts |= {f"{below}.{part}": tensor for part, tensor in parts.items()}
        return factor.rung

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
        What a record says of it: rungs that needed extra damping; and, if the last linear is
        rounded, the squared difference between the streams behind the half before and after that.
    """
    layers[REFITTED] = build(rounder.values)
    rungs = _round_readers(half, rounder, layers, passes())
    layers[REFITTED] = build(rounder.values)
    found, more = _round_writer(half, rounder, layers, passes())
    layers[REFITTED] = build(rounder.values)
    rungs = [rung for rung in (*rungs, *more) if rung != UNDAMPED]
    return {"damping": ROUNDING_RIDGES[0], "rungs": rungs, **found}


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
    step, rung = _step(own, ROUNDING_RIDGES[0], ", ".join(firsts))
    weights += step
    parts = torch.split(weights, [len(rounder.before(name)) for name in firsts])
    wanted = dict(zip(firsts, parts, strict=True))
    rungs = [rung, rounder.take(wanted, sums.gram)]
    for name in names:
        if name not in firsts:
            first = rounder.value(f"{name.removesuffix('second')}first")
            gram = congruence(first, sums.gram)
            rungs.append(rounder.take({name: rounder.before(name)}, gram))
    return rungs


def _round_writer(
    half: str, rounder: Rounder, layers: Layers, microbatches: Iterator[Streams]
) -> tuple[dict[str, float], list[str]]:
    *firsts, last = rounder.of((half,))
    if not rounder.rounds(last):
        return {}, []
    out_dim, dim = rounder.value(last).shape
    device = str(rounder.value(last).device)
    less = empty_sums(dim, out_dim, device=device)
    stream_cross = torch.zeros_like(less.cross)
    grams = {}  # of what the first of two factors reads
    for name in firsts:
        width = rounder.value(name).shape[1]
        grams[name] = torch.zeros(width, width, dtype=torch.float64, device=device)
    add, shortcut = HALVES[half]
    energy = 0.0
    with _inputs(
        {name: (layers[REFITTED], rounder.module(name)) for name in (*firsts, last)}
    ) as seen:
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
            for name, gram in grams.items():
                accumulate(gram, seen[name].flatten(0, -2))
    rungs = [rounder.take({name: rounder.before(name)}, gram) for name, gram in grams.items()]
    old = rounder.before(last)
    own = RestSums(gram=less.gram, cross=stream_cross, energy=less.energy)
    step, rung = _step(less, ROUNDING_RIDGES[0], last)
    of_stream, other = _step(own, ROUNDING_RIDGES[1], last)
    wanted = old + step + STREAM_SHARE * of_stream
    rungs += [rung, other, rounder.take({last: wanted}, less.gram)]
    whole = RestSums(
        gram=less.gram,
        cross=less.cross + stream_cross,
        energy=torch.tensor([energy], dtype=torch.float64, device=less.gram.device),
    )
    after = whole.left((rounder.value(last) - old).T)
    return {"rest_before": energy, "rest_after": after}, rungs


def _step(sums: RestSums, damping: float, name: str) -> tuple[Tensor, str]:
    step, rung = least_squares_step(sums, damping=damping, where=f"correction of {name}")
    return step.T, rung


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
