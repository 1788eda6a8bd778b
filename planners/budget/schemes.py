"""How matrices may be stored: the options, and ladders whose levels are a width and a scheme.

A module that is cut to a width may also be quantised, by each of a list of schemes. Each scheme
gives a ladder of its own beside that of the width alone, so one hull chooses among widths, bits and
groups.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from planners.errors import ConfigError
from planners.method import Ladder, Option, OptionSpec
from planners.model.cost import BYTES_OF, layer_bytes, matrices
from planners.model.form import LayerForm
from planners.model.modules import LINEARS_OF
from planners.model.scheme import WHOLE_ROW, Scheme, dividing_group
from planners.model.shape import ModelShape

QUANTISER = "gptq"  # the method that rounds what others cut
# None has 2 bits: results lose much by them, so they are taken only if they are asked for.
DEFAULT_SCHEMES = "3/32,3/128,4/32,4/128,5/128,6/128,8/128"
ROUNDED_TOKENS = 3072  # of the probe, on which all levels are measured where there are schemes
SMALLEST_GROUP = 16  # where no larger group divides a row, the row is one
ATTENTION = "attention"  # q, k, v and o as one module, where they share a scheme

# Without defaults: absent unless bytes or bits are budgeted.
SCHEMES = OptionSpec(
    name="schemes",
    default="",
    help="how matrices may be stored beside the numbers of the input, as BITS/GROUP with commas; "
    f"with --keep-bytes or --bits {DEFAULT_SCHEMES}; none: they are not quantised",
)
TIE = OptionSpec(
    name="tie",
    default="",
    help="fused: q, k, v and o of a layer share a scheme, as engines that fuse them require, and "
    "gate, up and down; free: q and k may differ from v and o [fused]",
)
_NAMED = re.compile(r"([2-8])/(\d{1,5}|row)")


def schemes_of(options: Mapping[str, Option]) -> tuple[Scheme, ...]:
    """Return the schemes among which a hull chooses; none where nothing is quantised.

    Raises:
        ConfigError: a scheme cannot be read.
    """
    named = str(options.get(SCHEMES.name, ""))
    where = f"options.{SCHEMES.name}"
    return tuple(scheme_named(each.strip(), where) for each in named.split(",")) if named else ()


def scheme_named(named: str, where: str) -> Scheme:
    """Return the scheme of a name such as ``4/128``; ``where`` it is given, for the error.

    Raises:
        ConfigError: it is no scheme.
    """
    found = _NAMED.fullmatch(named)
    if found is None or found[2].startswith("0"):
        raise ConfigError(
            f"{where}: {named[:20]!r} is no scheme; it must be BITS/GROUP, with 2 "
            "to 8 bits and a group of weights or row, such as 4/128",
        )
    group = WHOLE_ROW if found[2] == "row" else int(found[2])
    return Scheme(bits=int(found[1]), group=group)


def resolved_schemes(options: Mapping[str, Option], *, budgets_bits: bool) -> dict[str, Option]:
    """Return options in which what to quantise to is settled.

    Args:
        options: of a method, which has both.
        budgets_bits: bytes or bits are asked for.

    Raises:
        ConfigError: ``tie`` has another value.
    """
    named = str(options.get(SCHEMES.name, "")) or (DEFAULT_SCHEMES if budgets_bits else "none")
    rest = {name: value for name, value in options.items()
            if name not in (SCHEMES.name, TIE.name)}  # fmt: skip
    if named == "none":
        return rest
    tie = str(options.get(TIE.name, "")) or "fused"
    if tie not in ("fused", "free"):
        raise ConfigError(f"options.{TIE.name}: is {tie[:20]!r}; it must be one of: fused, free")
    return {**rest, SCHEMES.name: named.replace(" ", ""), TIE.name: tie}


def fitted(scheme: Scheme, width: int) -> Scheme:
    """Return a scheme whose group divides a row: the largest power of two that does, or the row."""
    group = dividing_group(scheme.group, width)
    return replace(scheme, group=group if group >= SMALLEST_GROUP else WHOLE_ROW)


def stored_as(
    shape: ModelShape, layer: LayerForm, roles: Sequence[str], scheme: Scheme | None
) -> LayerForm:
    """Return a layer with the matrices of these linears quantised; whole with None."""
    own = {n: d for n, d in matrices(shape, layer).items() if n.partition(".")[0] in roles}
    rest = {n: s for n, s in layer.schemes.items() if n.partition(".")[0] not in roles}
    if scheme is not None:
        rest |= {name: fitted(scheme, width) for name, (_, width) in own.items()}
    return replace(layer, schemes=rest)


def quantised(
    ladders: Mapping[str, Ladder],
    shape: ModelShape,
    layer: LayerForm,
    options: Mapping[str, Option],
) -> dict[str, Ladder]:
    """Return the ladders of a layer with one more for each module and scheme.

    Args:
        ladders: module -> ladder of its widths or ranks; of one that is not cut, see
            `whole_ladders`.
        shape: of the model.
        layer: that is cut.
        options: of the method.
    """
    found = dict(ladders)
    for module, ladder in ladders.items():
        if module not in LINEARS_OF:
            continue  # a cut that all layers share
        for scheme in schemes_of(options):
            found[f"{module} {scheme}"] = _of_scheme(ladder, module, scheme, shape, layer)
    return found


def whole_ladders(shape: ModelShape, layer: LayerForm) -> dict[str, Ladder]:
    """Return ladders of modules that are not cut, only quantised."""
    return {
        module: Ladder(sizes=range(0), whole=1, levels=(), cut=lambda form, _: form)
        for module in ("mlp", "qk", "vo")
        if {*LINEARS_OF[module]} & {*shape.kind(layer).roles}
    }


def _of_scheme(
    ladder: Ladder, module: str, scheme: Scheme, shape: ModelShape, layer: LayerForm
) -> Ladder:
    roles = LINEARS_OF[module]

    def cut(form: LayerForm, size: int) -> LayerForm:
        narrower = form if size == ladder.whole else ladder.cut(form, size)
        return stored_as(shape, narrower, roles, scheme)

    def cost(size: int) -> int:
        return layer_bytes(shape, cut(layer, size), width=BYTES_OF[shape.dtype])

    step = _step(ladder, module, scheme, shape, layer)
    wanted = {min(ladder.whole, max(step, step * round(size / step))) for size in ladder.levels}
    sizes = range(step, ladder.whole, step) if step > 1 else sorted(wanted)
    kept = [*(size for size in sizes if size in ladder.sizes), ladder.whole]
    if any(own != scheme for own in cut(layer, ladder.whole).schemes.values()):
        kept = list(_worth(kept, cost))[::-1]  # with smaller groups a narrower module may cost more
    levels = [size for size in reversed(kept) if size in wanted or size == ladder.whole]
    return replace(ladder, sizes=kept, levels=tuple(levels), cut=cut, module=module, scheme=scheme)


def _step(ladder: Ladder, module: str, scheme: Scheme, shape: ModelShape, layer: LayerForm) -> int:
    """Return the step of a width that leaves the groups of what reads it whole; 1: of a rank."""
    assert isinstance(ladder.sizes, range)  # only those of schemes are not
    smaller = ladder.cut(layer, ladder.sizes[-1]) if ladder.sizes else layer
    if smaller.ranks != layer.ranks:
        return 1
    if module == "qk" or scheme.group == WHOLE_ROW:
        return ladder.sizes.step
    heads = shape.num_heads if module == "vo" else 1
    group = dividing_group(scheme.group, heads * ladder.whole)
    return math.lcm(ladder.sizes.step, group // math.gcd(group, heads))


def _worth(sizes: Sequence[int], cost: Callable[[int], int]) -> Iterator[int]:
    """Yield sizes, the largest first, but for those that cost as much as a larger one."""
    least = math.inf
    for size in reversed(sizes):
        if (own := cost(size)) < least:
            least = own
            yield size
