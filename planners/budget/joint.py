"""Widths, bits and groups by measured damage, within one budget of bytes or of bits.

The tables outside the layers, embedding and head, have few levels, all of which are tried: each
leaves another budget for the layers, and has a damage of its own. A tied table that is quantised is
stored twice, as embedding and as head, since each may have its own bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planners.budget.budgets import Budget
from planners.budget.hull import Curves, Ladders, cheapest, lowest, read_curves, tied_schemes
from planners.budget.schemes import fitted
from planners.errors import PlanError
from planners.method import Allocation, Ladder
from planners.model.form import ModelForm, Start
from planners.model.scheme import Scheme
from planners.model.shape import ModelShape
from planners.model.stored_bytes import EMBEDDING, HEAD

# Bits of embedding and head that are tried; 16 stands for a table as it is.
TABLE_BITS = ((16, 16), (16, 8), (8, 8), (8, 4), (4, 4))
TABLE_GROUP = 128
WHOLE_BITS = 16


def table_schemes(shape: ModelShape) -> dict[str, Scheme]:
    """Return ``8`` and ``4`` -> the scheme of a table of so many bits."""
    found = {}
    for bits in sorted({bits for pair in TABLE_BITS for bits in pair} - {WHOLE_BITS}):
        found[str(bits)] = fitted(Scheme(bits=bits, group=TABLE_GROUP), shape.hidden)
    return found


def with_tables(shape: ModelShape, form: ModelForm, bits: tuple[int, int]) -> ModelForm:
    """Return a model whose embedding and head have so many bits."""
    known = table_schemes(shape)
    own = {
        name: known[str(each)]
        for name, each in zip((EMBEDDING, HEAD), bits, strict=True)
        if each != WHOLE_BITS
    }
    return replace(form, tables=own, tied=form.tied and not own)


def table_choices(start: Start, *, stock: bool) -> list[tuple[int, int]]:
    """Return the bits of embedding and head that a result may have.

    Args:
        start: the model that is quantised.
        stock: transformers' own class is to load it: it cannot fill a quantised embedding.
    """
    form = start.form
    found = [pair for pair in TABLE_BITS if not stock or pair[0] == WHOLE_BITS]
    if form.tied:  # its two copies must both be smaller than the one
        found = [pair for pair in found if pair == (WHOLE_BITS, WHOLE_BITS) or max(pair) <= 8]  # noqa: PLR2004
    if form.head_shortcut:
        found = found[:1]
    return found


def provisional(
    ladders: Sequence[Mapping[str, Ladder]], *, budget: Budget, start: Start, tied: bool
) -> ModelForm:
    """Return a model within a budget before any damage is known: one scheme, else the smallest.

    Args:
        ladders: of each layer.
        budget: of the whole model.
        start: the model that is cut.
        tied: q, k, v and o of a layer share a scheme.

    Raises:
        PlanError: the budget is below what the lowest levels reach.
    """
    names = {name.partition(" ")[2]: ladder.scheme for name, ladder in ladders[0].items()}
    for named in sorted(names, key=lambda name: -_bits(names[name])):
        layers = []
        for layer, known in zip(start.form.layers, ladders, strict=True):
            form = layer
            for name, ladder in known.items():
                if name.partition(" ")[2] == named and ladder.scheme is not None:
                    form = ladder.cut(form, ladder.whole)
            layers.append(form)
        form_ = replace(start.form, layers=tuple(layers))
        if budget.allows(form_):
            return form_
    own = [_tied(known) if tied else known for known in ladders]
    smallest = lowest([{"": known} for known in own], budget=budget, start=start)
    if not budget.allows(smallest):
        budget.refuse(budget.cost(smallest))
    return smallest


def _tied(ladders: Mapping[str, Ladder]) -> Mapping[str, Ladder]:
    """Return ladders in which q, k, v and o are one module, whatever the damage."""
    unknown = {name: [(size, 0.0) for size in each.levels] for name, each in ladders.items()}
    _, found = tied_schemes(unknown, ladders)
    return found


def _bits(scheme: Scheme | None) -> float:
    return float(WHOLE_BITS) if scheme is None else scheme.bits + 16 / max(scheme.group, 1)


def smallest_tables(shape: ModelShape, start: Start, *, stock: bool, budget: Budget) -> Start:
    """Return a start whose tables take the fewest bytes of all choices."""
    choices = table_choices(start, stock=stock)
    forms = [with_tables(shape, start.form, bits) for bits in choices]
    return replace(start, form=min(forms, key=budget.outside))


def by_bytes(  # noqa: PLR0913 what is measured, and what may be chosen
    shape: ModelShape,
    findings: Sequence[Mapping[str, object]],
    ladders: Sequence[Mapping[str, Ladder]],
    tables: Sequence[tuple[int, int]],
    *,
    budget: Budget,
    start: Start,
    tied: bool,
) -> Allocation:
    """Return the widths and schemes of least predicted damage within a budget.

    Args:
        shape: of the model.
        findings: of each layer, ``curves`` as measured, and ``tables`` of the first and last one.
        ladders: of each layer.
        tables: bits of embedding and head that are tried.
        budget: of the whole model.
        start: the model that is cut.
        tied: q, k, v and o of a layer share a scheme.

    Raises:
        PlanError: the budget is below what the lowest levels reach.
    """
    curves: list[Curves] = []
    own: list[Ladders] = []
    for finding, known in zip(findings, ladders, strict=True):
        measured: Mapping[str, Sequence[tuple[int, float]]] = read_curves(finding["curves"])
        found: Mapping[str, Ladder] = known
        if tied:
            measured, found = tied_schemes(measured, known)
        curves.append({"": measured})
        own.append({"": found})
    damages = _table_damages(findings)
    best: Allocation | None = None
    refused: PlanError | None = None
    for bits in tables:
        begun = replace(start, form=with_tables(shape, start.form, bits))
        try:
            each = cheapest(curves, own, budget=budget, start=begun)
        except PlanError as error:
            refused = error
            continue
        total = each.damage + sum(
            damages[name][str(own_bits)]
            for name, own_bits in zip((EMBEDDING, HEAD), bits, strict=True)
            if own_bits != WHOLE_BITS
        )
        if best is None or total < best.damage:
            best = replace(each, damage=total, makers=())
    if best is None:
        assert refused is not None  # there is always a choice
        raise refused
    return best


def _table_damages(findings: Sequence[Mapping[str, object]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for finding in findings:
        tables = finding.get("tables") or {}
        assert isinstance(tables, Mapping)  # of our own records
        found |= {name: dict(known) for name, known in tables.items()}
    return found
