"""Peak memory of a worker, in bytes: during a forward pass, and in each kind of unit.

Counted buffer by buffer from what the actors do; `benchmarks/plan_truth.py` compares it with
measurements. A compression unit holds no layers of the pass: they are freed before it starts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from planners import refit
from planners.budget.schemes import ROUNDED_TOKENS
from planners.memory.workspace import (
    PANEL,
    aligned_bytes,
    change_bytes,
    eigh_bytes,
    low_rank_bytes,
    nystrom_bytes,
    rounding_bytes,
    stack_bytes,
)
from planners.method import Candidate, MethodSpec, Option
from planners.model.cost import (
    BYTES_OF,
    dense_model_form,
    held_parameters,
    layer_bytes,
    layer_parameters,
    linear_dims,
    matrices,
    statistic_elements,
    tap_dim,
)
from planners.model.form import SOURCE, LayerForm, ModelForm, dense_form
from planners.model.layer import ATTENTION
from planners.model.packing import ROWS as BLOCK_ROWS
from planners.model.shape import ModelShape
from planners.model.taps import Statistic, input_of
from planners.recovery import Recovery

DOUBLE, SINGLE = 8, 4
LOGIT_TOKENS = 1024  # rows of logits in memory at one time
ROWS = 8192  # of a table that are in memory at one time
HOST_IN_FLIGHT = (
    2**33
)  # of the host of an accelerator: what its worker reads ahead and still writes
ROUNDED_AT_ONCE = 2**24  # weights of all schemes that are rounded side by side, at most
LIBRARIES = 64 * 2**20  # what torch and transformers allocate at first use, beside tensors


def forward_bytes(
    shape: ModelShape,
    statistics: frozenset[Statistic],
    *,
    tokens: int,
    sequence_length: int,
    dtype: str,
    form: LayerForm | None = None,
) -> int:
    """Return what the forward pass and statistics of one layer need beside weights and sums.

    ``tokens`` are those of all sequences. Without a ``form``, of an uncompressed layer.
    """
    layer = form or dense_form(shape)
    width = BYTES_OF[dtype]
    hidden = max(layer.residual_in, layer.residual_mid, layer.residual_out)
    head_dim = max(layer.qk_head_dim, layer.vo_head_dim)
    heads, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    # The residual, its normed copy and their inputs; then attention, or the MLP.
    attention = 3 * hidden + 4 * heads + 3 * kv
    mlp = 3 * hidden + 3 * layer.intermediate
    peak = max(
        tokens * attention * width + _scores(shape, layer, tokens, sequence_length),
        tokens * mlp * width,
    )
    for statistic in statistics:
        dim = tap_dim(shape, statistic.tap, layer)
        if not statistic.row.packed:
            continue
        # The float32 product of a block of rows is held beside the float64 sums; an input of a
        # narrower dtype, or a normed one, has a float32 copy too.
        copies = int(width < SINGLE) + int(statistic.row.normed)
        kept = tokens * (3 * hidden + dim) * width
        product = min(dim, BLOCK_ROWS) * dim
        peak = max(peak, kept + (product + tokens * dim * copies) * SINGLE)
    return peak


def _scores(shape: ModelShape, form: LayerForm, tokens: int, sequence_length: int) -> int:
    """Return what attention needs if it forms the scores of all heads at once.

    Blockwise kernels need query, key and value heads of one width. Without them there are the
    scores, their softmax and a byte of mask for each, beside scaled copies of queries and keys.
    """
    if form.qk_head_dim == form.vo_head_dim:
        return 0
    scores = sequence_length * (2 * SINGLE + 1)
    return tokens * shape.num_heads * (scores + 2 * form.qk_head_dim * SINGLE)


def loss_bytes(shape: ModelShape, *, tokens: int, dtype: str) -> int:
    """Return the bytes that the losses of one microbatch need beside the head."""
    rows = min(tokens, LOGIT_TOKENS)
    copies = 2 + int(BYTES_OF[dtype] < SINGLE)  # the logits, also in float32, and their softmax
    return rows * shape.vocab_size * SINGLE * copies + 3 * tokens * shape.hidden * BYTES_OF[dtype]


def table_bytes(shape: ModelShape, *, dtype: str) -> int:
    """Return the bytes of the embedding, or the head, in a stage."""
    return shape.vocab_size * shape.hidden * BYTES_OF[dtype]


def load_bytes(shape: ModelShape, *, dtype: str, form: LayerForm | None = None) -> int:
    """Return what loading a layer needs on top: its tensors in their stored dtype."""
    stored, layer = BYTES_OF[shape.dtype], form or dense_form(shape)
    if stored == BYTES_OF[dtype]:
        dims = (linear_dims(shape, layer, role) for role in shape.kind(layer).roles)
        return max(out * inner for out, inner in dims) * stored
    return held_parameters(shape, layer) * stored


@dataclass(frozen=True, kw_only=True)
class Shrinking:
    """Everything that determines the memory of the units of one method.

    Attributes:
        shape: of the model.
        form: of the result.
        spec: of the method.
        options: of the method.
        tokens: of one microbatch, and of all of them.
        sequence_length: tokens of one sequence.
        dtype: of the pass.
        start: widths of the input model; the uncompressed ones if None.
        mapped: the sums are mapped pages of files, without memory of their own.
        recovery: how the result is trained, where it is.
    """

    shape: ModelShape
    form: ModelForm
    spec: MethodSpec
    options: Mapping[str, Option]
    tokens: tuple[int, int]
    sequence_length: int
    dtype: str
    start: ModelForm | None = None
    mapped: bool = False
    recovery: Recovery | None = None

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The statistics that the method needs of each layer."""
        return self.spec.statistics(self.shape, self.options)

    @property
    def held(self) -> frozenset[Statistic]:
        """The statistics that take memory in a unit that reads them."""
        return frozenset() if self.mapped else self.statistics

    @cached_property
    def layers(self) -> list[tuple[LayerForm, LayerForm]]:
        """Each layer before and after; equal pairs once."""
        shape = self.shape
        before = (self.start or dense_model_form(shape)).layers
        found: list[tuple[LayerForm, LayerForm]] = []
        for pair in zip(before, self.form.layers, strict=True):
            if pair not in found:
                found.append(pair)
        return found

    def cells(self, layer: LayerForm) -> int:
        """Return the bytes of a layer in the dtype of the pass."""
        return held_parameters(self.shape, layer) * BYTES_OF[self.dtype]

    def passing(self, *layers: LayerForm) -> int:
        """Return the bytes that the forward pass of the widest of these layers needs."""
        return max(
            forward_bytes(
                self.shape,
                frozenset(),
                tokens=self.tokens[0],
                sequence_length=self.sequence_length,
                dtype=self.dtype,
                form=each,
            )
            for each in layers
        )


def nothing(step: Shrinking) -> int:
    """Return 0, for a unit that needs no more than the others of its phase."""
    del step
    return 0


def table_unit(step: Shrinking) -> int:
    """Return the peak of writing the embedding or the head."""
    shape = step.shape
    rows = min(ROWS, shape.vocab_size) * shape.hidden
    return rows * (BYTES_OF[shape.dtype] * 3 + (2 * SINGLE if step.spec.residual else 0))


def basis_unit(step: Shrinking) -> int:
    """Return the peak of computing the axes of one site, or of all."""
    if not step.spec.residual:
        return 0
    shape = step.shape
    square = shape.hidden**2 * DOUBLE
    if step.options.get("rotation") == "shared":
        return (
            3 * shape.num_sites + 1
        ) * square  # all grams, their scaled copies, and all of them side by side
    return eigh_bytes(shape.hidden) + square


def stream_unit(step: Shrinking) -> int:
    """Return the peak of passing tokens to a site through layers that are already compressed."""
    if not step.spec.residual or step.options.get("schedule") != "sequential":
        return 0
    gram = 4 * step.shape.hidden**2 * DOUBLE
    return max(2 * step.cells(b) + step.passing(b, layer) + gram for b, layer in step.layers)


def layer_unit(step: Shrinking) -> int:
    """Return the peak of shrinking one layer."""
    if step.spec.residual:
        shared = step.options.get("rotation") == "shared"
        return max(_rotated_layer(step.shape, *pair, shared=shared) for pair in step.layers)
    group = int(step.options.get("group", 2))
    return max(_shrunk_layer(step.shape, *pair, step.held, group=group) for pair in step.layers)


def in_flight(step: Shrinking) -> int:
    """Return what a worker holds for the units before and after the one that it computes.

    The largest result, which is being written, and the largest inputs, which are read ahead.
    """
    stored, square = BYTES_OF[step.shape.dtype], step.shape.hidden**2 * DOUBLE
    bases = int(step.spec.residual) * square
    inputs, results = [0], [bases]
    for before, after in step.layers:
        sums = sum(statistic_elements(step.shape, s, before) for s in step.held) * DOUBLE
        read = 0 if step.mapped else max(sums, 3 * bases)
        inputs.append(layer_parameters(step.shape, before) * stored + read)
        results.append(layer_parameters(step.shape, after) * stored)
    return max(inputs) + max(results)


def damage_unit(step: Shrinking) -> int:
    """Return the peak of measuring the cuts of one layer."""
    if step.spec.measures(step.options) != "damage":
        return 0
    makers = step.spec.candidates or (Candidate(spec=step.spec, options=step.options),)
    return max(
        _damage(step, before, cut, outputs=max(_outputs(step.shape, before, m) for m in makers))
        for before, layer in step.layers
        for cut in (layer, *_cuts(step.shape, before, makers))
    )


def refit_unit(step: Shrinking) -> int:
    """Return the peak of refitting one layer."""
    if not step.options.get("refit"):
        return 0
    streams = 3 * step.tokens[0] * step.shape.hidden * BYTES_OF[step.dtype]
    return max(
        refit.workspace_bytes(step.shape, layer_bytes=step.cells(before))
        + _corrected(step.shape, layer)
        + step.passing(before, layer)
        + streams
        for before, layer in step.layers
    )


def _corrected(shape: ModelShape, form: LayerForm) -> int:
    """Return what rounding a half-layer again needs beside what a refit does.

    The weights that are wanted and the step to them are in float64; then they are rounded.
    """
    if not form.schemes:
        return 0
    rows = [linear_dims(shape, form, role) for role in shape.kind(form).roles]
    mlp = sum(out * inner for out, inner in rows[4:-1])
    attention = sum(out * inner for out, inner in rows[:3])
    return 3 * DOUBLE * max(mlp, attention, *(out * inner for out, inner in rows)) + rounding_peak(
        shape, form
    )


def _cuts(
    shape: ModelShape, layer: LayerForm, candidates: Sequence[Candidate]
) -> Iterator[LayerForm]:
    """Yield a layer with one module cut, for each module and each competing method."""
    for each in candidates:
        for ladder in each.spec.ladders(shape, layer, each.options).values():
            for size in ladder.sizes[-1:]:  # a module of one pair cannot be cut
                yield ladder.cut(layer, size)


def _outputs(shape: ModelShape, layer: LayerForm, method: Candidate) -> int:
    """Return how many outputs of a layer pass through the later layers side by side.

    With ``damage=loss``: that of the uncut layer, and one for each level of each module.
    """
    if method.options.get("damage") != "loss":
        return 0
    ladders = method.spec.ladders(shape, layer, method.options).values()
    return 1 + sum(len(ladder.levels) for ladder in ladders)


def _rotated_layer(shape: ModelShape, start: LayerForm, form: LayerForm, *, shared: bool) -> int:
    """Return the bytes of a layer, its bases, the result, and the buffer of the largest product.

    That is a basis in float32, or a shortcut in float64. A block of rows, its scaled copy and its
    product are allocated again and again; the allocator keeps about as much of freed ones.
    """
    widths = (form.residual_in, form.residual_mid, form.residual_out)
    whole = layer_parameters(shape, start) + layer_parameters(shape, form)
    bases = shape.hidden * (widths[0] if shared else sum(widths)) * DOUBLE
    block = min(PANEL, max(shape.hidden, start.intermediate))
    blocks = 2 * 3 * block * shape.hidden * SINGLE
    rotating = max(widths) * shape.hidden * SINGLE
    shortcut = 0 if shared else widths[1] * max(widths[0], widths[2]) * DOUBLE
    return whole * BYTES_OF[shape.dtype] + bases + blocks + max(rotating, shortcut)


def _shrunk_layer(
    shape: ModelShape,
    start: LayerForm,
    form: LayerForm,
    statistics: frozenset[Statistic],
    *,
    group: int,
) -> int:
    """Return the bytes of a layer, its sums, the result, and the largest factorisation.

    ``group`` layers are read and factored together where they share factors.
    """
    stored = BYTES_OF[shape.dtype]
    sums = sum(statistic_elements(shape, s, start) for s in statistics) * DOUBLE
    before = layer_parameters(shape, start) * stored
    if form.links:  # a layer with which it shares, as that one is in the input model
        together = any(SOURCE not in link.parts for link in form.links.values())
        before += (before + sums * together) * (group - 1 if together else 1)
    factoring = _factorisation(shape, start, form, group)
    if not form.schemes:
        return int(before + layer_parameters(shape, form) * stored + sums + factoring)
    cut = 0 if replace(form, schemes={}) == start else layer_parameters(shape, form) * stored
    after = layer_bytes(shape, form, width=stored)
    rounding = carried_bytes(shape, start, form) + rounding_peak(shape, form)
    return int(before + cut + sums + max(factoring, after + rounding))


def carried_bytes(shape: ModelShape, start: LayerForm, form: LayerForm) -> int:
    """Return the bytes of the Gram matrices behind a cut: of the MLP's units, of o's inputs."""
    hidden = form.intermediate if form.intermediate < start.intermediate else 0
    heads = shape.num_heads * form.vo_head_dim if form.vo_head_dim < start.vo_head_dim else 0
    return DOUBLE * (hidden**2 + heads**2)


def rounding_peak(shape: ModelShape, form: LayerForm, copies: int = 1) -> int:
    """Return what rounding the linears of a layer needs, those with one input side by side.

    ``copies`` is by how many schemes they are rounded at one time.
    """
    rows: Counter[tuple[str, int]] = Counter()
    for name, (out_dim, in_dim) in matrices(shape, form).items():
        if name in form.schemes:
            rows[input_of(name), in_dim] += copies * out_dim
    return max((rounding_bytes(out, width) for (_, width), out in rows.items()), default=0)


def _factorisation(shape: ModelShape, start: LayerForm, form: LayerForm, group: int = 1) -> int:
    peaks = [0]
    sources = {name for name, link in form.links.items() if SOURCE in link.parts}
    if sources.difference(ATTENTION):
        peaks.append(aligned_bytes(start.intermediate, start.residual_in))
    if form.intermediate < start.intermediate:
        peaks.append(nystrom_bytes(start.intermediate, start.residual_out))
    if form.vo_head_dim < start.vo_head_dim:
        written = linear_dims(shape, start, "o_proj")[0]
        peaks.append(3 * shape.num_heads * start.vo_head_dim * written * DOUBLE)
    for name in form.ranks.keys() - start.ranks.keys():
        out_dim, in_dim = linear_dims(shape, start, name)
        if name in sources:
            peaks.append(change_bytes(out_dim, in_dim, form.ranks[name]))
        elif name in form.links:
            peaks.append(stack_bytes(out_dim, in_dim, group))
        else:
            peaks.append(low_rank_bytes(out_dim, in_dim, form.ranks[name]))
    return max(peaks)


def _damage(step: Shrinking, start: LayerForm, form: LayerForm, *, outputs: int) -> int:
    """Return the bytes of measuring cuts: the layer, two cut copies, and the probe's activations.

    ``outputs`` is how many outputs of the layer are kept to pass through the later layers.
    """
    shape, dtype = step.shape, step.dtype
    width = BYTES_OF[dtype]
    cells = layer_parameters(shape, start)
    probe = min(max((s.probe_tokens for s in step.statistics), default=0), step.tokens[1])
    if form.schemes:
        probe = min(probe, ROUNDED_TOKENS)
    held = cells * (BYTES_OF[shape.dtype] + 2 * width) + 3 * probe * shape.hidden * width
    if form.links:  # the source, the layer made like it, and its copy beside the cut one
        held += cells * (2 * BYTES_OF[shape.dtype] + width)
    sums = sum(statistic_elements(shape, s, start) for s in step.held) * DOUBLE
    probe_bytes = max(
        forward_bytes(
            shape,
            frozenset(),
            tokens=probe,
            sequence_length=step.sequence_length,
            dtype=dtype,
            form=each,
        )
        for each in (start, form)
    )
    # Damage is computed in float32, with the output and its difference beside it.
    passing = max(probe_bytes, 3 * probe * shape.hidden * SINGLE)
    if outputs:
        held += outputs * probe * shape.hidden * width
        head = table_bytes(shape, dtype=dtype) + loss_bytes(shape, tokens=probe, dtype=dtype)
        passing = max(passing, head)
    factoring = _factorisation(shape, start, form) + _axes(shape, start, form)
    if form.schemes:
        weights = sum(out * inner for name, (out, inner) in matrices(shape, form).items()
                      if name in form.schemes)  # fmt: skip
        copies = max(1, ROUNDED_AT_ONCE // weights)
        # Values of the schemes that are measured side by side, and factors that serve all sizes.
        factoring += copies * weights * SINGLE + carried_bytes(shape, start, form)
        factoring += rounding_peak(shape, form, copies) + 2 * shape.hidden**2 * DOUBLE
    # The factor is shared by all levels, so it is held while each of them is measured.
    return int(held + sums + factoring + cells * width + passing)


def _axes(shape: ModelShape, start: LayerForm, form: LayerForm) -> int:
    """Return the bytes of the axes of all factored linears, and of the factors of their grams."""
    total = 0
    for name in form.ranks.keys() - start.ranks.keys():
        out_dim, in_dim = linear_dims(shape, start, name)
        total += (1 + int(out_dim > in_dim)) * min(out_dim, in_dim) ** 2
    return total * DOUBLE
