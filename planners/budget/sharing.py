"""Which layers take matrices from which, and the ranks of what they add to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from planners.budget.budgets import Budget
from planners.budget.hull import Ladders, cheapest, read_curves, require_levels
from planners.budget.ranks import StepOf, rank_ladder
from planners.budget.widths import largest_share
from planners.errors import PlanError
from planners.method import Ladder
from planners.model.cost import linear_dims
from planners.model.form import SOURCE, LayerForm, Link, ModelForm, Start
from planners.model.layer import ATTENTION, ROLES
from planners.model.shape import ModelShape

PREVIOUS = -1  # the layer before, in measurements of a layer alone
EDGE = 2  # layers at either end that the paper's layouts leave whole

RankOf = Callable[[LayerForm, str], int]  # (layer, linear) -> rank
Sources = Mapping[int, int]  # layer -> the layer of whose matrices its own are changes


def alternating(num_layers: int) -> Sources:
    """Return every second layer between the edges, with the whole layer before it."""
    return {layer: layer - 1 for layer in range(EDGE, num_layers - EDGE, 2)}


def sequential(num_layers: int) -> Sources:
    """Return all layers between the edges, with the last whole layer before them."""
    return dict.fromkeys(range(EDGE, num_layers - EDGE), EDGE - 1)


def by_hand(layers: Sequence[int], sources: Sequence[int], *, num_layers: int) -> Sources:
    """Return layers with sources; with none given, the nearest earlier layers that stay whole.

    Raises:
        PlanError: a layer does not exist, is named twice or has no earlier source that is whole.
    """
    if len(set(layers)) < len(layers):
        raise PlanError(f"layers: {', '.join(map(str, layers))} names a layer twice")
    if sources and len(sources) != len(layers):
        raise PlanError(
            f"sources: {len(sources)} are given for {len(layers)} layers",
            hint="give one for each layer, or none",
        )
    _require_known("layers", layers, num_layers=num_layers)
    _require_known("sources", sources, num_layers=num_layers)
    given = sources or [_whole_before(layer, layers) for layer in layers]
    found = dict(zip(layers, given, strict=True))
    for layer, source in found.items():
        if source >= layer:
            raise PlanError(f"sources: layer {source} is not before layer {layer}, which needs it")
        if source in layers:
            raise PlanError(
                f"sources: layer {source} is itself a change of another, so layer {layer} cannot "
                "be a change of it"
            )
    return found


def _require_known(key: str, layers: Sequence[int], *, num_layers: int) -> None:
    unknown = [layer for layer in layers if not 0 <= layer < num_layers]
    if unknown:
        known = f"the model has layers 0 to {num_layers - 1}"
        raise PlanError(f"{key}: there is no layer {unknown[0]}; {known}")


def _whole_before(layer: int, changed: Sequence[int]) -> int:
    before = [other for other in range(layer) if other not in changed]
    if not before:
        raise PlanError(
            f"layers: layer {layer} has no earlier layer that stays whole",
            hint="leave the first layer out",
        )
    return before[-1]


def require_alike(shape: ModelShape, start: ModelForm, sources: Sources) -> None:
    """Check that layers have matrices of the same kinds and sizes as their sources.

    Raises:
        PlanError: a pair has not; the message names it.
    """
    for layer, source in sources.items():
        own, other = start.layers[layer], start.layers[source]
        if shape.kind(own) != shape.kind(other):
            raise PlanError(f"layers {source} and {layer} are of different kinds")
        if not (own.is_plain and other.is_plain) or own != other:
            raise PlanError(
                f"layers {source} and {layer} have not the same widths, or are factored",
                hint="make this the first step",
            )


def deltas(
    shape: ModelShape,
    start: Start,
    sources: Sources,
    names: Sequence[str],
    *,
    rank: int,
    fitted: bool,
) -> ModelForm:
    """Return the form in which all linears of these layers are changes of one rank.

    Raises:
        PlanError: a linear of that rank would be no smaller than it is.
    """
    for layer in sources:
        for name in _present(shape, start.form.layers[layer], names):
            out_dim, in_dim = linear_dims(shape, start.form.layers[layer], name)
            if rank * (out_dim + in_dim) >= out_dim * in_dim:
                most = (out_dim * in_dim - 1) // (out_dim + in_dim)
                raise PlanError(
                    f"rank: {rank} costs more than it saves in {name}, {out_dim} x {in_dim}",
                    hint=f"use at most {most}, or leave {name} out of modules",
                )
    return _form(shape, start, sources, names, lambda *_: rank, fitted=fitted)


def deltas_within(  # noqa: PLR0913 a model, what is shared, and how
    shape: ModelShape,
    start: Start,
    sources: Sources,
    names: Sequence[str],
    *,
    budget: Budget,
    step: StepOf,
    fitted: bool,
) -> ModelForm:
    """Return the form in which the changes keep the largest share that the budget allows.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """

    def at(share: float) -> ModelForm:
        if share >= 1:
            return start.form

        def rank(layer: LayerForm, name: str) -> int:
            out_dim, in_dim = linear_dims(shape, layer, name)
            by = step((out_dim, in_dim))
            most = (out_dim * in_dim - 1) // (out_dim + in_dim)
            return by * int(min(share * out_dim * in_dim / (out_dim + in_dim), most) / by)

        return _form(shape, start, sources, names, rank, fitted=fitted)

    return largest_share(at, budget)


def _form(
    shape: ModelShape,
    start: Start,
    sources: Sources,
    names: Sequence[str],
    rank_of: RankOf,
    *,
    fitted: bool,
) -> ModelForm:
    layers = list(start.form.layers)
    for layer, source in sources.items():
        own = layers[layer]
        ranks = {name: rank_of(own, name) for name in _present(shape, own, names)}
        layers[layer] = _changed(own, ranks, source, fitted=fitted)
    return replace(start.form, layers=tuple(layers), native=False)


def _changed(layer: LayerForm, ranks: Mapping[str, int], source: int, *, fitted: bool) -> LayerForm:
    """Return a layer whose linears are changes, of these ranks, of those of another layer."""
    links = {name: Link(layer=source, parts=(SOURCE,), fitted=fitted) for name in ranks}
    kept = {**layer.ranks, **{name: rank for name, rank in ranks.items() if rank}}
    return replace(
        layer,
        ranks={name: kept[name] for name in ROLES if name in kept},
        links={**layer.links, **links},
    )


def _present(shape: ModelShape, layer: LayerForm, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in shape.kind(layer).roles]


def delta_ladder(
    shape: ModelShape,
    layer: LayerForm,
    module: str,
    shares: Sequence[float],
    *,
    step: StepOf,
    fitted: bool,
) -> Ladder | None:
    """Return the ladder of a module whose linears are changes of those of the layer before."""
    if layer.links:
        return None
    ladder = rank_ladder(shape, layer, module, shares, step=step)
    if ladder is None:
        return None
    factored = ladder.cut

    def cut(other: LayerForm, size: int) -> LayerForm:
        ranks = factored(other, size).ranks
        new = {name: rank for name, rank in ranks.items() if name not in other.ranks}
        return _changed(other, new, PREVIOUS, fitted=fitted)

    return replace(ladder, cut=cut)


def deltas_by_damage(
    findings: Sequence[Mapping[str, object]],
    ladders: Sequence[Mapping[str, Ladder]],
    *,
    budget: Budget,
    start: Start,
) -> tuple[ModelForm, float]:
    """Return the ranks within the budget by measured damage, and the predicted damage.

    Damage was measured with the layer before as the source. Where attention or the MLP of that one
    is changed too, the source is the nearest earlier layer where it stays whole: what is aligned
    moves all of it. The first layer always does.

    Args:
        findings: of each layer, ``curves``: module -> [[size, damage], ...].
        ladders: of each layer, module -> its ladder.
        budget: of the whole model.
        start: the model whose layers become changes of others.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    known = [{"": read_curves(finding["curves"])} for finding in findings]
    found = cheapest(known, in_hull(ladders), budget=budget, start=start)
    layers = []
    for index, layer in enumerate(found.form.layers):
        links = {}
        for name, link in layer.links.items():
            before = range(index - 1, -1, -1)
            whole = next(i for i in before if _is_whole(found.form.layers[i], name))
            links[name] = replace(link, layer=whole)
        layers.append(replace(layer, links=links))
    return replace(found.form, layers=tuple(layers)), found.damage


def _is_whole(layer: LayerForm, name: str) -> bool:
    """Return whether nothing of the block of a linear, attention or MLP, is a change."""
    heads = name in ATTENTION
    return all((other in ATTENTION) != heads for other in layer.links)


def require_deltas(
    ladders: Sequence[Mapping[str, Ladder]], *, budget: Budget, start: Start
) -> None:
    """Check that a budget can be met, before anything is measured.

    Raises:
        PlanError: it cannot; the message says how small it can get.
    """
    require_levels(in_hull(ladders), budget=budget, start=start)


def in_hull(ladders: Sequence[Mapping[str, Ladder]]) -> list[Ladders]:
    """Return the ladders of a model for `planners.budget.hull`: none of the first layer."""
    return [{"": dict(own) if index else {}} for index, own in enumerate(ladders)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of the factors of linears that a group of layers shares.

    Attributes:
        first: rows of the factor that reads.
        core: as `LayerForm.cores` has it; None without a matrix between the factors.
        parts: the factors that all layers but the first take from it.
    """

    first: int
    core: int | None
    parts: tuple[str, ...]


SizesOf = Callable[[tuple[int, int], int, float], Sizes | None]  # (out, in), layers, share


def basis_sizes(dims: tuple[int, int], layers: int, share: float) -> Sizes | None:
    """Return the rank of a shared basis of inputs with coefficients of each layer.

    All together they store that share of the parameters at most; None where no rank stores fewer
    than the matrices.
    """
    out_dim, in_dim = dims
    rank = _largest(layers * out_dim * in_dim, share, lambda r: r * (in_dim + layers * out_dim))
    return Sizes(first=rank, core=None, parts=("first",)) if rank else None


def tucker_sizes(dims: tuple[int, int], layers: int, share: float) -> Sizes | None:
    """Return the ranks of shared bases of inputs and outputs, and of a core of each layer.

    Both are the same share of their widths.
    """
    out_dim, in_dim = dims
    wide, narrow = max(dims), min(dims)

    def other(rank: int) -> int:
        return max(1, rank * wide // narrow)

    def stored(rank: int) -> int:  # of the narrower side
        return rank * narrow + other(rank) * wide + layers * rank * other(rank)

    rank = _largest(layers * out_dim * in_dim, share, stored)
    if not rank:
        return None
    first, core = (rank, other(rank)) if in_dim == narrow else (other(rank), rank)
    return Sizes(first=first, core=core, parts=("first", "second"))


def cp_sizes(dims: tuple[int, int], layers: int, share: float) -> Sizes | None:
    """Return the number of components that layers share, with a number of each layer for each."""
    out_dim, in_dim = dims
    rank = _largest(layers * out_dim * in_dim, share, lambda r: r * (in_dim + out_dim + layers))
    rank = min(rank, layers * min(dims))  # there are no more
    return Sizes(first=rank, core=0, parts=("first", "second")) if rank else None


def _largest(whole: int, share: float, stored: Callable[[int], int]) -> int:
    """Return the largest rank that stores at most a share of the elements, at least 1.

    0 where even that stores no fewer than all.
    """
    low, high = 0, whole
    while low < high:
        middle = (low + high + 1) // 2
        allowed = stored(middle) <= share * whole and stored(middle) < whole
        low, high = (middle, high) if allowed else (low, middle - 1)
    return max(low, int(stored(1) < whole))


def groups_of(shape: ModelShape, size: int) -> list[tuple[int, ...]]:
    """Return consecutive layers of one kind, so many in each group; the last may be smaller."""
    groups: list[tuple[int, ...]] = []
    for layer in range(shape.num_layers):
        last = groups[-1] if groups else ()
        if last and len(last) < size and shape.kind_of[last[0]] == shape.kind_of[layer]:
            groups[-1] = (*last, layer)
        else:
            groups.append((layer,))
    return groups


def shared_within(  # noqa: PLR0913 a model, what is shared, and how
    shape: ModelShape,
    start: Start,
    names: Mapping[str, SizesOf],
    *,
    alone: Sequence[str],
    group: int,
    budget: Budget,
    step: StepOf,
) -> ModelForm:
    """Return the form in which linears of groups of layers share factors, within a budget.

    All keep one share of their parameters, the largest that the budget allows. A linear of which no
    factors would be smaller stays whole.

    Args:
        shape: of the model.
        start: the model whose layers share.
        names: linear -> how its factors are sized.
        alone: of these linears, those of which no layer takes anything from another.
        group: layers that share.
        budget: of the whole model.
        step: of ranks.

    Raises:
        PlanError: the budget cannot be met; the message says how small it can get.
    """
    groups, singles = groups_of(shape, group), groups_of(shape, 1)

    def at(share: float) -> ModelForm:
        layers = list(start.form.layers)
        for name, sizes_of in names.items():
            for members in singles if name in alone else groups:
                first = members[0]
                if name not in shape.kind(layers[first]).roles:
                    continue
                dims = linear_dims(shape, layers[first], name)
                sizes = _stepped(sizes_of(dims, len(members), share), dims, len(members), step)
                if sizes is None or share >= 1:
                    continue
                for member in members:
                    link = None if member == first else Link(layer=first, parts=sizes.parts)
                    layers[member] = _factored(layers[member], name, sizes, link)
        return replace(start.form, layers=tuple(layers), native=False)

    return largest_share(at, budget)


def _stepped(sizes: Sizes | None, dims: tuple[int, int], layers: int, step: StepOf) -> Sizes | None:
    """Return ranks rounded down to a step, at least one; None where they store no fewer than all.

    No factor has more rows than there are, but of components, which may be more.
    """
    if sizes is None:
        return None
    (out_dim, in_dim), by = dims, step(dims)
    first, core = (max(by, rank // by * by) if rank else rank for rank in (sizes.first, sizes.core))
    assert first is not None  # only the core may be
    rows = core or first
    seconds = 1 if "second" in sizes.parts else layers
    between = 0 if core is None else layers * first * (core or 1)
    stored = first * in_dim + seconds * rows * out_dim + between
    too_many = core != 0 and (first > in_dim or rows > out_dim * seconds)
    if too_many or stored >= layers * out_dim * in_dim:
        return None
    return replace(sizes, first=first, core=core)


def _factored(layer: LayerForm, name: str, sizes: Sizes, link: Link | None) -> LayerForm:
    ranks = {**layer.ranks, name: sizes.first}
    cores = {**layer.cores} if sizes.core is None else {**layer.cores, name: sizes.core}
    return replace(
        layer,
        ranks={role: ranks[role] for role in ROLES if role in ranks},
        cores={role: cores[role] for role in ROLES if role in cores},
        links=layer.links if link is None else {**layer.links, name: link},
    )
