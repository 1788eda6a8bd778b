"""The lists in a report document as frozen data; missing keys get their defaults here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from orchestrator.report.numbers import number

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One site on the residual stream, its spectrum and its cut.

    Attributes:
        name: as shown to users.
        where: ``attention``, ``mlp`` or ``head``; ``site`` for any other.
        points: (component, eigenvalue relative to the largest), descending, positive only.
        energy_kept: 0 to 1; None if it was not computed.
        rung: which step of the factorisation ladder gave the basis.
    """

    index: int
    name: str
    where: str
    points: tuple[tuple[float, float], ...]
    dim: int
    keep_dim: int
    energy_kept: float | None
    rung: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix of a layer of a quantised result.

    Attributes:
        name: of its linear, such as ``q_proj``, or of one of two factors.
        rows: outputs.
        width: inputs.
        scheme: bits and group, such as ``4/32``; empty if it is not quantised.
        bits: of a weight; 0 if it is not quantised.
        error: relative error of its outputs on the calibration data; None if not measured.
        nearest: the same if each weight is rounded to the nearest value.
        factor: how the Gram matrix of its inputs was factored.
    """

    name: str
    rows: int
    width: int
    scheme: str
    bits: int
    error: float | None
    nearest: float | None
    factor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder block before and after.

    Attributes:
        widths: kept width by module; ``widths_before`` the dense ones, if they are known.
        error: relative error of the layer's output on the probe; None if not measured.
        cuts: module -> (method, what it kept), if several methods compete.
        matrices: of a quantised result.
    """

    index: int
    before: float
    after: float
    widths: Mapping[str, float]
    widths_before: Mapping[str, float]
    error: float | None
    cuts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    matrices: tuple[Matrix, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stretch of work of one worker, in seconds since the run began."""

    worker: str
    unit: str
    kind: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event of the run, with its time in seconds since the start."""

    at: float
    what: str
    detail: str


def section(report: Document, *path: str) -> Document:
    """Return the mapping at that path, empty if there is none."""
    found: Any = report
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def rows(report: Document, key: str) -> tuple[Document, ...]:
    """Return the list of mappings under a key, empty if there is none."""
    found = report.get(key)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return ()
    return tuple(row for row in found if isinstance(row, Mapping))


def sites(report: Document) -> tuple[Site, ...]:
    """Return the sites of a residual method, in the order of the residual stream."""
    found = [
        Site(
            index=int(row.get("site", position)),
            name=_site_name(row),
            where=_known(row.get("where")),
            points=_points(row.get("eigenvalues") or (), int(row.get("dim", 0))),
            dim=int(row.get("dim", 0)),
            keep_dim=int(row.get("keep_dim", row.get("dim", 0))),
            energy_kept=number(row.get("energy_kept")),
            rung=str(row.get("rung", "")),
        )
        for position, row in enumerate(rows(report, "sites"))
    ]
    return tuple(sorted(found, key=lambda site: site.index))


def layers(report: Document) -> tuple[Layer, ...]:
    """Return the layers in order."""
    found = [
        Layer(
            index=int(row.get("layer", position)),
            before=number(row.get("before")) or 0.0,
            after=number(row.get("after")) or 0.0,
            widths=_numbers(section(row, "widths")),
            widths_before=_numbers(section(row, "widths_before")),
            error=number(row.get("error")),
            cuts={
                str(module): (str(cut.get("method", "")), str(cut.get("kept", "")))
                for module, cut in section(row, "cuts").items()
                if isinstance(cut, Mapping)
            },
            matrices=_matrices(row),
        )
        for position, row in enumerate(rows(report, "layers"))
    ]
    return tuple(sorted(found, key=lambda layer: layer.index))


def spans(report: Document) -> tuple[Span, ...]:
    """Return the work of all workers, sorted by start."""
    found = []
    for row in rows(report, "timeline"):
        start, end = number(row.get("start")), number(row.get("end"))
        if start is None or end is None:
            continue
        found.append(
            Span(
                worker=str(row.get("worker", "worker")),
                unit=str(row.get("unit", "")),
                kind=str(row.get("kind", "other")),
                start=start,
                end=max(start, end),
            )
        )
    return tuple(sorted(found, key=lambda span: (span.start, span.worker, span.unit)))


def events(report: Document) -> tuple[Event, ...]:
    """Return the events of the run, sorted by time."""
    found = [
        Event(
            at=number(row.get("at")) or 0.0,
            what=str(row.get("what", "")),
            detail=str(row.get("detail") or ""),
        )
        for row in rows(report, "events")
    ]
    return tuple(sorted(found, key=lambda event: event.at))


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts ``worker-2`` before ``worker-10``."""
    cuts = [0, *(i for i in range(1, len(name)) if name[i].isdigit() != name[i - 1].isdigit())]
    parts = [name[start:stop] for start, stop in pairwise([*cuts, len(name)])]
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)


def _matrices(row: Document) -> tuple[Matrix, ...]:
    return tuple(
        Matrix(
            name=str(each.get("name", "")),
            rows=int(each.get("rows", 0)),
            width=int(each.get("width", 0)),
            scheme=str(each.get("scheme", "")),
            bits=int(each.get("bits", 0)),
            error=number(each.get("error")),
            nearest=number(each.get("nearest")),
            factor=str(each.get("factor") or ""),
        )
        for each in rows(row, "matrices")
    )


def _known(where: object) -> str:
    return str(where) if where in ("attention", "mlp", "head") else "site"


def _site_name(row: Document) -> str:
    where = str(row.get("where", "site"))
    inside = where in ("attention", "mlp") and "layer" in row
    return f"layer {row['layer']} {where}" if inside else where


def _numbers(found: Document) -> dict[str, float]:
    known = {str(key): number(value) for key, value in found.items()}
    return {key: value for key, value in known.items() if value is not None}


def _points(eigenvalues: Sequence[Any], dim: int) -> tuple[tuple[float, float], ...]:
    """Return (component, relative eigenvalue); samples are spread evenly from 1 to ``dim``."""
    values = [number(value) for value in eigenvalues]
    largest = max((value for value in values if value is not None), default=0.0)
    if largest <= 0.0:
        return ()
    step = (max(dim, 2) - 1) / max(len(values) - 1, 1)
    return tuple(
        (1.0 + step * position, value / largest)
        for position, value in enumerate(values)
        if value is not None and value > 0.0
    )
