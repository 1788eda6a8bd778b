"""The work of each task of a run: operations by kind, bytes read, written and touched.

Derived from shapes and forms alone, not from the method's name: a residual method decomposes its
sites, a smaller FFN is a Nystrom refit, a narrower value head and a pair of factors each have their
factorisation. For a method with other maths the estimate is wrong until it is timed.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace

from planners import refit
from planners.batching import TokenBatching
from planners.model.cost import (
    BYTES_OF,
    held_parameters,
    layer_parameters,
    linear_dims,
    linear_products,
    matrices,
    shortcut_parameters,
    statistic_elements,
    tap_dim,
    tap_dims,
    width_at,
)
from planners.model.form import SOURCE, LayerForm, dense_form
from planners.model.layer import ATTENTION
from planners.model.modules import of_modules
from planners.model.shape import ModelShape
from planners.model.taps import Statistic, input_of

EIGH = 9  # operations of a symmetric eigendecomposition with all vectors, times n^3
LEVELS = 6  # cuts of each module at which damage is measured, as in the default grid
ROUNDED_BYTES = 1000  # moved for a weight that is rounded: the search for scales, and columns
PROBE_TOKENS = 8192  # tokens on which damage is measured, likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An amount of work; the same fields are also used for rates per second.

    Attributes:
        matmul: operations of products in the dtype of the pass.
        gram: operations of products that are formed in float32.
        float64: operations of float64 products, Cholesky factorisations and triangular solves.
        eigh: operations of float64 eigendecompositions, counted as 9 n^3.
        touched: bytes that elementwise work moves through memory.
        read: bytes from files.
        written: bytes to files, hashed on the way.
        calls: operations of a fixed cost, whatever their size.
    """

    matmul: float = 0.0
    gram: float = 0.0
    float64: float = 0.0
    eigh: float = 0.0
    touched: float = 0.0
    read: float = 0.0
    written: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Return the work of both."""
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in KINDS})

    def times(self, count: float) -> "Work":
        """Return the work of ``count`` such tasks."""
        return Work(**{name: getattr(self, name) * count for name in KINDS})

    def seconds(self, rates: "Work") -> float:
        """Return the seconds at these rates, without overlap."""
        return float(sum(getattr(self, name) / getattr(rates, name) for name in KINDS))

    @property
    def flops(self) -> float:
        """All operations."""
        return self.matmul + self.gram + self.float64 + self.eigh


KINDS = tuple(field.name for field in fields(Work))
CALL = Work(calls=1)
CP_SWEEPS, TUCKER_SWEEPS = 50, 5  # of alternating least squares, as they were seen to need
ASSIGNED = 0.3  # operations of matching n units, in n^3: 21 s where their products take 149 s


def half_forward(
    shape: ModelShape, form: LayerForm, linears: Iterable[str], *, tokens: int, data: TokenBatching
) -> Work:
    """Return the work of these linears in a forward pass; attention counts with ``q_proj``."""
    names = tuple(linears)
    weights = sum(linear_products(shape, form, name) for name in names)
    width = BYTES_OF[data.dtype]
    inner = sum(linear_dims(shape, form, name)[0] for name in names)
    touched = tokens * (inner + 3 * form.residual_in) * 2 * width
    flops = 2 * tokens * weights
    if "q_proj" in names:
        heads = shape.num_heads * (form.qk_head_dim + form.vo_head_dim)
        flops += 2 * tokens * heads * (data.sequence_length // 2)  # causal
    if form.shortcuts:
        flops += 2 * tokens * form.residual_mid * form.residual_in
    return Work(matmul=flops, touched=touched)


def _mlp(shape: ModelShape, form: LayerForm) -> tuple[str, ...]:
    return tuple(role for role in shape.kind(form).roles if role not in ATTENTION)


def layer_forward(shape: ModelShape, form: LayerForm, *, tokens: int, data: TokenBatching) -> Work:
    """Return the work of the forward pass of one layer."""
    return half_forward(shape, form, shape.kind(form).roles, tokens=tokens, data=data)


def layer_statistics_work(
    shape: ModelShape,
    statistics: Iterable[Statistic],
    *,
    tokens: int,
    form: LayerForm | None = None,
) -> Work:
    """Return what summing one layer's statistics over one microbatch adds to its forward."""
    layer = form or dense_form(shape)
    total = Work()
    for statistic in statistics:
        at = tap_dims(shape, statistic.tap, layer)
        elements = statistic_elements(shape, statistic, layer)
        total += Work(gram=2 * tokens * at.dim * statistic.row.columns(at))
        # The product in float32, and the sum that it is added to.
        total += Work(touched=tokens * at.dim * 8 + elements * 20)
    return total


def loss_work(shape: ModelShape, width: int, *, tokens: int) -> Work:
    """Return the work of the logits and losses of tokens."""
    return Work(
        matmul=2 * tokens * width * shape.vocab_size, touched=tokens * shape.vocab_size * 16
    )


def load_work(shape: ModelShape, form: LayerForm) -> Work:
    """Return the work of reading one layer and converting its dtype."""
    count = held_parameters(shape, form)
    return CALL + Work(read=count * BYTES_OF[shape.dtype], touched=count * 8)


def table_load_work(shape: ModelShape, width: int) -> Work:
    """Return the work of reading the embedding or the head."""
    count = shape.vocab_size * width
    return Work(read=count * BYTES_OF[shape.dtype], touched=count * 8)


def publish_work(
    shape: ModelShape, statistics: Iterable[Statistic], form: LayerForm | None = None
) -> Work:
    """Return the work of writing one layer's sums."""
    return CALL + Work(written=_gram_bytes(shape, statistics, form))


def adding_work(
    shape: ModelShape, statistics: Iterable[Statistic], form: LayerForm | None, *, shards: int
) -> Work:
    """Return the work of adding the sums of all shards of one layer."""
    size = _gram_bytes(shape, statistics, form)
    return CALL + Work(read=shards * size, touched=3 * shards * size, written=size)


def carried_work(shape: ModelShape, statistics: Iterable[Statistic]) -> Work:
    """Return the work of rotating the sums of one layer after a step that kept every axis."""
    wanted = tuple(statistics)
    size = _gram_bytes(shape, wanted, None)
    rotated = [s for s in wanted if s.row.packed and tap_dim(shape, s.tap) == shape.hidden]
    products = 4 * shape.hidden**3 * len(rotated)
    return CALL + Work(float64=products, read=size, written=size, touched=3 * size)


def losses_work(shape: ModelShape, form: LayerForm, statistics: Iterable[Statistic]) -> Work:
    """Return the work of measuring the loss of truncating one layer to the ranks of a form."""
    before = layer_parameters(shape, dense_form(shape, form.kind)) * BYTES_OF[shape.dtype]
    read = before + _gram_bytes(shape, statistics, None)
    return CALL + Work(read=read) + shrink_work(shape, form, shape.kind(form).roles)


def basis_work(shape: ModelShape, keep_dim: int, *, sites: int = 1) -> Work:
    """Return the work of computing the axes of one site, or those that several share."""
    square = shape.hidden**2
    return CALL + Work(
        eigh=EIGH * shape.hidden**3,
        touched=square * 8 * (10 + 3 * sites),
        read=square * 8 * sites,
        written=shape.hidden * keep_dim * 8,
    )


def layer_work(
    shape: ModelShape,
    form: LayerForm,
    statistics: Iterable[Statistic],
    *,
    residual: bool,
    start: LayerForm | None = None,
) -> Work:
    """Return the work of reading, shrinking and writing a layer; a dense one without ``start``."""
    width, first = BYTES_OF[shape.dtype], start or dense_form(shape, form.kind)
    before, after = layer_parameters(shape, first), layer_parameters(shape, form)
    total = CALL + Work(
        read=before * width, written=after * width, touched=(before + after) * (width + 8)
    )
    if residual:
        return total + _rotation(shape, form)
    sums = Work(read=_gram_bytes(shape, statistics, first))
    if form.links:  # the layer with which it shares is read, too
        total += Work(read=before * width)
    return total + sums + shrink_work(shape, form, shape.kind(form).roles, first)


def shrink_work(
    shape: ModelShape, form: LayerForm, linears: Iterable[str], start: LayerForm | None = None
) -> Work:
    """Return the work of the factorisations of some linears for a layer's form."""
    names, first = set(linears), start or dense_form(shape, form.kind)
    total = Work()
    if "down_proj" in names and form.intermediate < first.intermediate:
        total += _nystrom(first.intermediate, first.residual_out, form.intermediate)
    if "v_proj" in names and form.vo_head_dim < first.vo_head_dim:
        total += _value_heads(shape, form.vo_head_dim)
    for name in names & (form.ranks.keys() - first.ranks.keys()):
        total += _factored(form, name, *linear_dims(shape, first, name))
    sources = {name for name in names if SOURCE in _taken(form, name)}
    return total + _aligning(shape, first, sources) + rounding_work(shape, form)


def _taken(form: LayerForm, name: str) -> tuple[str, ...]:
    link = form.links.get(name)
    return () if link is None else link.parts


def _factored(form: LayerForm, name: str, out_dim: int, in_dim: int) -> Work:
    """Return the work of factoring one linear, with what it shares with other layers."""
    rank, taken, seen = form.ranks[name], _taken(form, name), 4 * out_dim * in_dim * in_dim
    if taken and SOURCE not in taken:
        return Work(float64=seen)
    if name in form.cores:  # sweeps over a pair of matrices
        sweeps = CP_SWEEPS if form.cores[name] == 0 else TUCKER_SWEEPS
        eigh = 0 if form.cores[name] == 0 else sweeps * EIGH * (out_dim**3 + in_dim**3)
        return Work(float64=seen + sweeps * 12 * out_dim * in_dim * rank, eigh=eigh)
    found = _low_rank(out_dim, in_dim, rank=rank)
    return found + Work(float64=seen) if taken else found


def _aligning(shape: ModelShape, form: LayerForm, names: Collection[str]) -> Work:
    """Return the work of ordering and turning heads and units like those of another layer."""
    heads = shape.num_heads * form.qk_head_dim if {*names} & {*ATTENTION} else 0
    units = form.intermediate if {*names} - {*ATTENTION} else 0
    products = 2 * form.residual_in * (3 * units**2 + 4 * heads**2)
    return Work(float64=products + ASSIGNED * units**3)


def rounding_work(shape: ModelShape, form: LayerForm, *, factors: bool = True) -> Work:
    """Return the work of rounding the matrices that a layer quantises.

    ``factors``: that of factoring the Gram matrices of their inputs is counted, too.
    """
    total, inputs = Work(), set()
    for name, (out_dim, in_dim) in matrices(shape, form).items():
        if name in form.schemes:
            inputs.add((input_of(name), in_dim))
            weights = out_dim * in_dim
            total += Work(matmul=weights * in_dim, touched=ROUNDED_BYTES * weights)
    cubes = sum(width**3 for _, width in inputs) / 3 if factors else 0
    return total + Work(float64=cubes)


def damage_work(
    shape: ModelShape,
    forms: Collection[LayerForm],
    data: TokenBatching,
    start: LayerForm | None = None,
    *,
    tokens: int,
) -> Work:
    """Return the work of cutting each module to each level of a grid and measuring the damage.

    Args:
        shape: the model.
        forms: one per module, with only that module cut.
        data: batching of the calibration tokens.
        start: the uncut layer; a dense one if None.
        tokens: on which damage is measured.
    """
    dense = start or dense_form(shape)
    forward = layer_forward(shape, dense, tokens=tokens, data=data)
    # The reference output; its first half runs twice, once for the activations between the halves.
    total = CALL + forward + half_forward(shape, dense, ATTENTION, tokens=tokens, data=data)
    weights = layer_parameters(shape, dense) * BYTES_OF[shape.dtype]
    total += Work(read=weights * (2 if any(form.links for form in forms) else 1))
    seen: set[frozenset[str]] = set()  # matrices of which some scheme was counted
    for form in forms:
        only_mlp = of_modules(dense, form, ("qk", "vo")) == dense
        passed = _mlp(shape, form) if only_mlp else shape.kind(form).roles
        after = half_forward(shape, form, passed, tokens=tokens, data=data)
        compare = Work(touched=tokens * shape.hidden * 16 + weights)
        total += (after + compare).times(LEVELS)
        if form.schemes:  # all schemes share the cut, and the factors of its Gram matrices
            total += rounding_work(shape, form, factors=_is_first(form, seen)).times(LEVELS)
            continue
        # Low-rank axes are computed once for all levels; widths are refitted at each level.
        factored = shrink_work(shape, form, shape.kind(form).roles, dense)
        total += factored.times(1 if form.ranks.keys() - dense.ranks.keys() else LEVELS)
    return total


def _is_first(form: LayerForm, seen: set[frozenset[str]]) -> bool:
    """Return whether these matrices are quantised for the first time, and note it."""
    own = frozenset(form.schemes)
    first = own not in seen
    seen.add(own)
    return first


def refit_start_work(shape: ModelShape, data: TokenBatching) -> Work:
    """Return the work of embedding the tokens, once for each stream."""
    return CALL + table_load_work(shape, shape.hidden) + _streams(shape, data, writes=1, reads=0)


def refit_layer_work(
    shape: ModelShape, form: LayerForm, data: TokenBatching, start: LayerForm | None = None
) -> Work:
    """Return the work of refitting both halves of one layer after the layers before it."""
    dense = start or dense_form(shape, form.kind)
    bytes_ = BYTES_OF[shape.dtype]
    held = 1 / refit.HELD_OUT
    total = CALL + Work(
        read=(layer_parameters(shape, dense) + layer_parameters(shape, form)) * bytes_,
        written=layer_parameters(shape, form) * bytes_,
    )
    for names, last in ((ATTENTION, "o_proj"), (_mlp(shape, form), "down_proj")):
        out_dim, dim = linear_dims(shape, form, last)
        dim = form.ranks.get(last, dim)
        full = half_forward(shape, dense, names, tokens=data.tokens, data=data)
        cut = half_forward(shape, form, names, tokens=data.tokens, data=data)
        # Once for the sums, once to pass on; the drafted stream has only held-out tokens.
        total += (full + cut).times(2) + cut.times(held)
        total += Work(gram=2 * data.tokens * dim * (dim + out_dim))
        if form.schemes:  # once more for those that read the half's input
            total += (full + cut) + corrected_work(shape, form, names, data)
            total += _streams(shape, data, writes=1, reads=3)
            continue
        solves = dim**3 / 3 + 4 * dim * dim * out_dim
        total += Work(float64=solves, touched=dim * (dim + out_dim) * 40).times(len(refit.RIDGES))
        total += _streams(shape, data, writes=1, reads=2)
    return total


def corrected_work(
    shape: ModelShape, form: LayerForm, names: Iterable[str], data: TokenBatching
) -> Work:
    """Return the work of rounding one half of a layer again, but for the passes of its tokens."""
    own = [role for role in names if role in shape.kind(form).roles]
    readers, last = own[:-1], own[-1]
    out_dim, dim = linear_dims(shape, form, last)
    width = linear_dims(shape, form, readers[0])[1]
    rows = sum(linear_dims(shape, form, role)[0] for role in readers)
    kept = {n: s for n, s in form.schemes.items() if n.partition(".")[0] in own}
    sums = Work(gram=4 * data.tokens * width * width + 2 * data.tokens * dim * out_dim)
    solves = width**3 / 3 + 4 * width * width * rows + 2 * (dim**3 / 3 + 2 * dim * dim * out_dim)
    touched = 40 * (width * (width + rows) + dim * (dim + out_dim))
    total = sums + Work(float64=solves, touched=touched)
    return total + rounding_work(shape, replace(form, schemes=kept))


def refit_losses_work(shape: ModelShape, data: TokenBatching) -> Work:
    """Return the work of the losses of three models on the held-out tokens."""
    held = data.tokens // refit.HELD_OUT
    loss = loss_work(shape, shape.hidden, tokens=held).times(3)
    return CALL + table_load_work(shape, shape.hidden) + loss


def chosen_work(shape: ModelShape, form: LayerForm) -> Work:
    """Return the work of copying one layer into the result."""
    count = layer_parameters(shape, form) * BYTES_OF[shape.dtype]
    return CALL + Work(read=count, written=count)


def stream_work(
    shape: ModelShape, form: LayerForm, site: int, keep_dim: int, data: TokenBatching
) -> Work:
    """Return the work of passing tokens to a site through compressed layers, with their gram.

    Args:
        shape: of the model.
        form: of the layer that leads to the site.
        site: their destination; at the first one they are embedded.
        keep_dim: width at the site before.
        data: the tokens of one shard.
    """
    square, stream = shape.hidden**2, data.tokens * shape.hidden
    width = BYTES_OF[data.dtype]
    total = CALL + Work(gram=2 * stream * shape.hidden, written=square * 8)
    if site == 0:
        return total + table_load_work(shape, shape.hidden)
    names = ATTENTION if site % 2 else _mlp(shape, form)
    weights = layer_parameters(shape, dense_form(shape, form.kind)) * BYTES_OF[shape.dtype]
    cut = Work(matmul=2 * stream * keep_dim)
    passed = half_forward(shape, form, names, tokens=data.tokens, data=data)
    moved = Work(read=weights + stream * width, written=stream * width)
    return total + _rotation(shape, form) + cut + passed + moved


def table_work(shape: ModelShape, width: int, *, residual: bool) -> Work:
    """Return the work of writing the embedding or the head with ``width`` columns."""
    count, bytes_ = shape.vocab_size * shape.hidden, BYTES_OF[shape.dtype]
    rotation = 2 * count * width if residual else 0
    # Hashed as a tensor and as a file.
    written = 2 * shape.vocab_size * width * bytes_
    return CALL + Work(read=count * bytes_, matmul=rotation, written=written, touched=count * 8)


def _rotation(shape: ModelShape, form: LayerForm) -> Work:
    """Return the work of rotating all linears of a layer, and its two shortcuts."""
    dense = dense_form(shape, form.kind)
    flops, elements = 0, 0
    for linear in shape.kind(form).linears:
        end = linear.writes if linear.writes.startswith("residual") else linear.reads
        keep = width_at(shape, form, end)
        out_dim, in_dim = linear_dims(shape, dense, linear.role)
        flops += 2 * out_dim * in_dim * keep
        elements += out_dim * in_dim
    crossing = 2 * shape.hidden * shortcut_parameters(form)
    bases = shape.hidden * (form.residual_in + form.residual_mid + form.residual_out)
    return Work(matmul=flops, float64=crossing, touched=elements * 12, read=bases * 8)


def _nystrom(dim: int, out_dim: int, keep: int) -> Work:
    """Return the work of two Cholesky factorisations, the inverse of one, and the refit."""
    flops = 2 * dim**3 / 3 + dim**3 + dim * dim * out_dim * 2 + keep * keep * out_dim
    return Work(float64=flops, touched=dim * dim * 8 * 16)


def _value_heads(shape: ModelShape, keep: int) -> Work:
    h, wide = shape.head_dim, shape.num_heads // shape.num_kv_heads * shape.hidden
    flops = h**3 + 4 * h * h * wide + 2 * keep * h * wide + 2 * keep * h * shape.hidden
    count = shape.num_kv_heads
    return Work(float64=count * flops, eigh=count * EIGH * h**3, touched=count * h * wide * 32)


def _low_rank(out_dim: int, in_dim: int, *, rank: int) -> Work:
    small = min(out_dim, in_dim)
    products = 2 * out_dim * in_dim * in_dim + 2 * small * small * max(out_dim, in_dim)
    if out_dim <= in_dim:
        factors = 2.0 * rank * out_dim * in_dim
    else:
        factors = in_dim**3 / 3 + 2 * rank * out_dim * in_dim + rank * in_dim * in_dim
    return Work(
        float64=products + factors,
        eigh=EIGH * small**3,
        touched=(in_dim * in_dim * 5 + small * small * 5 + out_dim * in_dim * 3) * 8,
    )


def _gram_bytes(shape: ModelShape, statistics: Iterable[Statistic], form: LayerForm | None) -> int:
    return 8 * sum(statistic_elements(shape, s, form) for s in statistics)


def _streams(shape: ModelShape, data: TokenBatching, *, writes: int, reads: int) -> Work:
    size = refit.STREAMS * data.tokens * shape.hidden * BYTES_OF[data.dtype]
    return Work(read=reads * size, written=writes * size)
