"""The report of a run as one self-contained HTML page: no script, no font, no network."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.report import (
    bits,
    expected,
    layers,
    numbers,
    spectra,
    summary,
    timeline,
    training,
)
from orchestrator.report.document import Document, section
from orchestrator.report.document import events as read_events
from orchestrator.report.document import layers as read_layers
from orchestrator.report.document import rows as read_rows
from orchestrator.report.document import sites as read_sites
from orchestrator.report.document import spans as read_spans
from orchestrator.report.serving import serving_pairs
from orchestrator.report.svg import Plot
from planners.units.kinds import PHASES

_PLAN_ROWS = (
    ("Disk for the run", "disk_bytes", numbers.bytes_text),
    ("Calibration", "calibration_flops", numbers.flops_text),
    ("Stages", "num_stages", numbers.count),
    ("Waves", "num_waves", numbers.count),
    ("Chains of stages", "num_chains", numbers.count),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A row with a value and a bar; ``share`` is 0 to 1 of the longest."""

    name: str
    value: str
    share: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One key of the recipe."""

    key: str
    value: str
    default: bool


def render_page(report: Document) -> str:
    """Return the HTML page; the same report gives the same bytes.

    ``report`` has the keys of ``report.json``. Sections without data are left out.
    """
    environment = Environment(
        loader=PackageLoader("orchestrator.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.jinja").render(
        **_headline(report), **_evidence(report), **_facts(report), numbers=numbers
    )


def _headline(report: Document) -> dict[str, Any]:
    return {
        "title": summary.title(report),
        "verdict": summary.verdict(report),
        "is_ready": summary.is_ready(report),
        "tone": summary.tone(report),
        "quality_note": summary.quality_note(report),
        "advice": summary.advice(report),
        "sentence": summary.sentence(report),
        "comparisons": summary.comparisons(report),
        "tiles": summary.tiles(report),
        "asked": summary.asked(report),
        "promise": summary.promise(report),
        "served": summary.served(report),
        "bits_note": bits.bits_note(report),
        "damped_note": bits.damped_note(report),
        "kinds_of_bytes": bits.by_kind(report),
        "measured_on": summary.measured_on(report),
        "makers_note": summary.makers_note(report),
        "refit_note": summary.refit_note(report),
        "recovery_note": training.recovery_note(report),
        "memory_note": summary.memory_note(report),
        "statistics_note": summary.statistics_note(report),
        "throughput_note": summary.throughput_note(report),
        "kernels_note": summary.kernels_note(report),
        "slower": summary.slower(report),
        "slower_because": summary.slower_because(report),
        "loading_code": summary.loading_code(report),
        "serving": serving_pairs(
            read_rows(report, "serving"), summary.checkpoint_path(report), quoted=False
        ),
        "created": str(report.get("created") or ""),
        "version": str(report.get("version") or ""),
    }


def _evidence(report: Document) -> dict[str, Any]:
    sites, blocks = read_sites(report), read_layers(report)
    spans, events = read_spans(report), read_events(report)
    return {
        "sites": sites,
        "layers": blocks,
        "widths": sorted({name for layer in blocks for name in layer.widths}),
        "cut_modules": summary.cut_modules(report),
        "events": events,
        "kinds": timeline.by_kind(spans),
        "site_plots": _drawn(
            spectra.energy(sites), spectra.depth_map(sites), spectra.panels(sites)
        ),
        "matrices": bits.table(blocks),
        "layer_plots": _drawn(
            bits.heat_map(report, blocks),
            layers.parameters(blocks),
            layers.widths(blocks),
            layers.errors(blocks),
            bits.errors(blocks),
        ),
        "training_plots": _drawn(training.curve(report), training.errors(report)),
        "training_tables": training.tables(report),
        "time_plots": _drawn(timeline.workers(spans, events)),
    }


def _facts(report: Document) -> dict[str, Any]:
    verify = section(report, "verify")
    return {
        "phases": _phases(report),
        "total_seconds": numbers.seconds_text(section(report, "seconds").get("total")),
        "memory": _memory(report),
        "planned": _planned(report),
        "expected": expected.expectations(report),
        "expected_source": expected.source(report),
        "checks": [check for check in verify.get("checks") or () if isinstance(check, dict)],
        "settings": _settings(report),
        "environment": _flat(section(report, "environment")),
        "provenance": _provenance(report),
    }


def _breakable(text: str) -> Markup:
    """Return the escaped text with possible line breaks, none of them inside a number."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])(?!(?<=\d\.)\d)", text))


def _drawn(*plots: Plot | None) -> list[Plot]:
    return [plot for plot in plots if plot is not None]


def _phases(report: Document) -> list[Bar]:
    seconds = section(report, "seconds")
    rest = sorted(key for key in seconds if key not in (*PHASES, "total"))
    known = {key: numbers.number(seconds.get(key)) for key in (*PHASES, *rest)}
    total = numbers.number(seconds.get("total"))
    longest = max((value for value in known.values() if value), default=1.0)
    return [
        Bar(
            name=key,
            value=numbers.seconds_text(value),
            share=value / longest,
            note=numbers.percent(numbers.quotient(value, total), digits=0) if total else "",
        )
        for key, value in known.items()
        if value  # phases without work are left out
    ]


def _memory(report: Document) -> list[Bar]:
    memory = section(report, "memory")
    planned = numbers.number(memory.get("planned_worker_bytes"))
    if planned is None:
        planned = numbers.number(section(report, "plan").get("worker_bytes"))
    # A driver that found all work done by an earlier one reports 0.
    worker = numbers.number(memory.get("worker_peak_bytes")) or None
    ratio = numbers.quotient(worker, planned)
    found = (
        ("Worker, planned", planned, ""),
        ("Worker, measured peak", worker, f"{numbers.change(ratio)} against plan" if ratio else ""),
        ("Driver, measured peak", numbers.number(memory.get("driver_peak_bytes")), ""),
    )
    longest = max((value for _, value, _ in found if value), default=1.0)
    return [
        Bar(name=name, value=numbers.bytes_text(value), share=value / longest, note=note)
        for name, value, note in found
        if value is not None
    ]


def _planned(report: Document) -> list[tuple[str, str]]:
    plan = section(report, "plan")
    return [(name, text(plan[key])) for name, key, text in _PLAN_ROWS if key in plan]


def _settings(report: Document) -> list[Setting]:
    defaults = {str(key) for key in report.get("recipe_defaults") or ()}
    return [
        Setting(key=key, value=value, default=key in defaults)
        for key, value in _flat(section(report, "recipe"))
    ]


def _provenance(report: Document) -> list[tuple[str, str]]:
    model = section(report, "model")
    found = [(f"Model {key}", _text(value)) for key, value in model.items() if value]
    for step in section(report, "method").get("steps") or ():
        options = ", ".join(f"{key}={value}" for key, value in _flat(section(step, "options")))
        modules = _text(step.get("modules") or [])
        found.append((f"Method {step.get('name', '')}", f"modules {modules}; {options or 'plain'}"))
    for name, key in (("Created", "created"), ("compress-cluster", "version")):
        if report.get(key):
            found.append((name, str(report[key])))
    if numbers.number(report.get("resumed_units")) is not None:
        resumed = numbers.count(report["resumed_units"])
        found.append(("Units resumed from an earlier attempt", resumed))
    return found


def _flat(found: Document, prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, text) of every leaf, in the order of the document."""
    flat: list[tuple[str, str]] = []
    for key, value in found.items():
        if isinstance(value, dict) and value:
            flat.extend(_flat(value, f"{prefix}{key}."))
        else:
            flat.append((f"{prefix}{key}", _text(value)))
    return flat


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False)
