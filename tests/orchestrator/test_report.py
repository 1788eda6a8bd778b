import io
import json
import re
import statistics
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from orchestrator.report import (
    bits,
    numbers,
    render_page,
    render_terminal,
    spectra,
    summary,
    timeline,
)
from orchestrator.report.document import Span, sites
from orchestrator.report.document import layers as read_layers
from orchestrator.report.svg import ticks
from planners.units.kinds import KINDS

PLOTS = {"energy", "spectra", "parameters", "widths", "errors", "timeline"}
MAX_PAGE_BYTES = 1_500_000
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """The elements of a page, and whether they are nested right."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def timed(*, prefill: list[float], decode: list[float], **beside: Any) -> dict[str, Any]:
    """Return what was measured of a model at one batch, in tokens per second of each round."""
    main = {
        "batch": 16,
        "mode": "eager",
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode),
    }
    rounds = [list(pair) for pair in zip(prefill, decode, strict=True)]
    return {**main, "settings": [{**main, "rounds": rounds}], **beside}


def sample_report(num_layers: int = 5, hidden: int = 128, num_workers: int = 2) -> dict[str, Any]:
    """Return a report with everything in it, shaped like that of a real run."""
    keep = hidden * 3 // 4
    return {
        "verdict": "READY",
        "title": "tiny · slicegpt · slice 0.25",
        "created": "2026-03-14T09:26:53+00:00",
        "version": "0.1.0",
        "out": "runs/tiny-slicegpt",
        "model": {"source": "tiny", "family": "llama", "revision": "3f1c9a" * 8},
        "method": {
            "steps": [
                {
                    "name": "slicegpt",
                    "options": {"rotation": "per_site", "round_to": 8},
                    "modules": ["residual"],
                }
            ]
        },
        "target": {
            "keep_fraction": None,
            "slice": 0.25,
            "actual_keep_fraction": 0.8472,
            "nominal": 0.25,
        },
        "parameters": {"before": 1_239_040, "after": 1_049_728, "keep_fraction": 0.8472},
        "bytes": {"before": 4_961_280, "after": 4_203_520},
        "evaluation": {
            "source": "tokens:evaluation.safetensors",
            "sequence_length": 256,
            "num_tokens": 16_320,
            "dense": {"perplexity": 4.1234},
            "compressed": {"perplexity": 4.5321},
        },
        "throughput": {
            "dense": timed(prefill=[21_450.0] * 6, decode=[412.0] * 6),
            "compressed": timed(prefill=[24_310.0] * 6, decode=[431.5] * 6),
        },
        "seconds": {
            "total": 41.7,
            "calibrate": 12.4,
            "compress": 6.1,
            "stitch": 0.3,
            "verify": 7.9,
            "evaluate": 13.6,
        },
        "memory": {
            "driver_peak_bytes": 212_000_000,
            "worker_peak_bytes": 148_000_000,
            "planned_worker_bytes": 141_000_000,
        },
        "plan": {
            "worker_bytes": 141_000_000,
            "disk_bytes": 23_000_000,
            "calibration_flops": 1.62e11,
            "num_stages": num_workers,
            "num_waves": 1,
        },
        "sites": sample_sites(num_layers, hidden, keep),
        "layers": [
            {
                "layer": layer,
                "before": 198_272,
                "after": 176_000 - 900 * (layer % 3),
                "widths": {"residual": keep, "intermediate": 352 - 8 * (layer % 3)},
                "widths_before": {"residual": hidden, "intermediate": 352},
                "error": 0.012 + 0.004 * layer,
            }
            for layer in range(num_layers)
        ],
        "timeline": list(sample_timeline(num_layers, num_workers)),
        "events": [{"at": 9.5, "what": "worker lost", "detail": "worker-1, its layers move"}],
        "verify": {
            "passed": True,
            "checks": [
                {"name": "logits equal", "passed": True, "detail": "largest difference 2e-6"},
                {"name": "generation with and without cache", "passed": True, "detail": ""},
                {"name": "checksums of all files", "passed": True, "detail": "9 files"},
            ],
        },
        "recipe": {
            "model": "tiny",
            "method": {"name": "slicegpt", "slice": 0.25, "round_to": 8, "pca_on": "residual"},
            "calibration": {"source": "stdlib", "sequences": 128, "sequence_length": 256},
            "evaluation": {"source": "stdlib", "sequences": 64},
            "workers": num_workers,
            "seed": 0,
        },
        "recipe_defaults": [
            "method.round_to",
            "method.pca_on",
            "calibration.source",
            "calibration.sequences",
            "evaluation.source",
            "seed",
        ],
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.3.0",
            "ray": "2.54.0",
            "devices": ["cpu (2 cores)", "cpu (2 cores)"],
            "platform": "Linux x86_64",
        },
        "resumed_units": 3,
    }


def sample_sites(num_layers: int, hidden: int, keep: int) -> list[dict[str, Any]]:
    found = []
    for index in range(2 * num_layers + 1):
        fall = 9.0 - 4.0 * index / (2 * num_layers)
        count = min(hidden, 256)
        spectrum = [40.0 * 2.718 ** (-fall * (i / (count - 1)) ** 0.5) for i in range(count)]
        kept = sum(spectrum[: count * keep // hidden]) / sum(spectrum)
        where = "head" if index == 2 * num_layers else ("attention", "mlp")[index % 2]
        found.append(
            {
                "site": index,
                "layer": min(index // 2, num_layers - 1),
                "where": where,
                "eigenvalues": spectrum,
                "dim": hidden,
                "keep_dim": keep,
                "energy_kept": kept,
                "rung": "eigh",
            }
        )
    return found


def sample_timeline(num_layers: int, num_workers: int) -> Iterator[dict[str, Any]]:
    for worker in range(num_workers):
        name = f"worker-{worker}"
        mine = range(worker, num_layers, num_workers)
        clock = 1.2 + 0.4 * worker
        for part in range(16):
            yield _work(name, f"microbatch-{part:03d}", "calibrate", clock, 0.62)
            clock += 0.66
        for kind, seconds in (("statistics", 0.35), ("basis", 0.9), ("layer", 0.7)):
            for layer in mine:
                yield _work(name, f"{kind}-{layer:05d}", kind, clock, seconds)
                clock += seconds + 0.05
        if worker == 0:
            yield _work(name, "embedding", "embedding", clock, 0.4)
            yield _work(name, "head", "head", clock + 0.45, 0.5)
            yield _work(name, "verify", "verify", clock + 1.2, 4.9)
        clock += 6.5
        for part in range(4):
            yield _work(name, f"evaluation-part-{part:03d}", "evaluate", clock, 2.9)
            clock += 3.0


def _work(worker: str, unit: str, kind: str, start: float, seconds: float) -> dict[str, Any]:
    return {"worker": worker, "unit": unit, "kind": kind, "start": start, "end": start + seconds}


@cache
def sample_page() -> str:
    return render_page(sample_report())


def minimal_report() -> dict[str, Any]:
    """Return a report with the keys that every run promises, and no others."""
    full = sample_report()
    promised = "verdict model method parameters evaluation throughput seconds memory"
    return {key: full[key] for key in promised.split()}


def report_without_plots() -> dict[str, Any]:
    """Return the sample report without what is drawn: its words alone are a page in no time."""
    drawn = {"sites", "layers", "timeline"}
    return {key: value for key, value in sample_report().items() if key not in drawn}


def terminal_text(report: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_terminal(report))
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_every_plot_is_drawn_twice_with_a_text_alternative() -> None:
    page = sample_page()
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 2 * len(PLOTS)
    for svg in svgs:
        assert 'role="img"' in svg.split(">")[0]
        title, description = re.findall(r"<(?:title|desc) [^>]*>([^<]+)</", svg)
        assert title
        assert description
        assert svg.count("<path") > 4
    drawn = {key.split("-")[0] for key in Page(page).values("aria-labelledby") if " " in key}
    assert drawn == PLOTS


def test_every_curve_and_bar_is_there() -> None:
    page = sample_page()
    svg = {
        key: re.search(rf'<svg[^>]*aria-labelledby="{key}-wide-.*?</svg>', page, re.DOTALL)
        for key in PLOTS
    }
    found = {key: hit.group() for key, hit in svg.items() if hit}
    assert found["spectra"].count("var(--ink);stroke-width:0.9") == 11  # one cut a site
    assert found["parameters"].count("fill:var(--kept)") == 5
    assert found["parameters"].count("fill:var(--before)") == 5
    assert "residual" in found["widths"]
    assert "intermediate" in found["widths"]
    assert found["errors"].count("fill:var(--kept)") == 5
    assert "worker-1" in found["timeline"]


def test_ids_are_unique_and_every_reference_resolves() -> None:
    text = sample_page()
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = [href[1:] for href in page.values("href") if href.startswith("#")]
    references += [name for value in page.values("aria-labelledby") for name in value.split()]
    references += re.findall(r"url\(#([^)]+)\)", text)
    assert references
    assert set(references) <= set(ids)


def test_the_page_loads_nothing() -> None:
    page = Page(sample_page())
    loads = page.values("src") + page.values("href") + page.values("xlink:href")
    assert all(value.startswith(("#", "data:")) for value in loads)
    assert not {"script", "iframe", "object", "embed", "base"} & set(page.tags())
    assert not re.search(r"@import|url\((?!#)", sample_page())
    assert "http" not in sample_page().replace("http-equiv", "")


def test_hostile_names_are_text_and_nothing_else() -> None:
    hostile = "</title><script>alert(1)</script><img src=x onerror=y>'\"{{ 7*7 }} $\\foo$ \x1b[31m"
    report = sample_report()
    report["title"] = report["out"] = report["model"]["source"] = hostile
    report["evaluation"]["source"] = report["verdict"] = report["version"] = hostile
    report["recipe"][hostile] = hostile
    report["environment"][hostile] = [hostile]
    report["events"][0]["detail"] = report["verify"]["checks"][0]["detail"] = hostile
    report["timeline"][0] |= {"worker": hostile, "kind": hostile, "unit": hostile}
    report["layers"][0]["widths"][hostile] = 8
    report["method"]["steps"][0]["name"] = hostile
    page = Page(render_page(report))
    assert not {"script", "img"} & set(page.tags())
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    assert "\x1b" not in terminal_text(report)


def test_the_same_report_gives_the_same_bytes() -> None:
    again = json.loads(json.dumps(sample_report()))
    assert render_page(again) == sample_page()


def test_the_promised_keys_alone_make_a_page_and_a_summary() -> None:
    report = minimal_report()
    page = render_page(report)
    assert "<svg" not in page
    assert "undefined" not in page.lower()
    assert "4.532" in page
    assert "84.7" in terminal_text(report)


@pytest.mark.parametrize("report", [{}, {"verdict": "FAILED", "sites": None, "verify": None}])
def test_an_unfinished_run_has_a_page_too(report: dict[str, Any]) -> None:
    assert summary_sections(render_page(report)) == ["result", "load"]
    assert terminal_text(report)


def summary_sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


def test_sections_come_in_the_promised_order() -> None:
    order = "result spectra layers timeline plan verification recipe environment provenance load"
    assert summary_sections(sample_page()) == order.split()


def test_headings_descend_one_level_at_a_time() -> None:
    levels = [int(tag[1]) for tag in Page(sample_page()).tags() if tag in _HEADINGS]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


_HEADINGS = {f"h{level}" for level in range(1, 7)}


def test_a_model_of_eighty_layers_stays_small_and_shows_all_sites() -> None:
    page = render_page(sample_report(num_layers=80, hidden=8192, num_workers=16))
    assert len(page.encode()) < MAX_PAGE_BYTES
    assert "8 of 161 sites" in page
    assert page.count("data:image/png;base64") == 2


def test_the_site_that_keeps_least_is_among_the_chosen() -> None:
    rows = sample_sites(80, 256, 192)
    rows[37]["energy_kept"] = 0.2
    chosen = spectra.chosen(sites({"sites": rows}))
    assert 37 in [site.index for site in chosen]
    assert [chosen[0].index, chosen[-1].index] == [0, 160]


def test_eigenvalues_that_no_logarithm_can_show_are_left_out() -> None:
    report = minimal_report() | {"sites": sample_sites(5, 128, 96)}
    report["sites"][0]["eigenvalues"] = [0.0] * 8
    report["sites"][1]["eigenvalues"] = [1.0, 0.5, 0.0, -1e-9, float("nan")]
    report["sites"][2]["eigenvalues"] = []
    assert "10 \u00b7 head" in render_page(report)


def test_a_spectrum_without_a_cut_and_a_single_layer_are_drawn() -> None:
    report = sample_report(num_layers=1, num_workers=1)
    for site in report["sites"]:
        site |= {"keep_dim": site["dim"], "energy_kept": 1.0}
    assert render_page(report).count("<svg") == 2 * len(PLOTS)


def test_nothing_is_said_of_a_throughput_that_was_not_measured() -> None:
    report = report_without_plots()
    del report["throughput"]
    assert "Decode" not in terminal_text(report)
    assert "range over the rounds" not in render_page(report)


def test_table_and_sentences_say_the_same_of_a_speed() -> None:
    report = report_without_plots()
    dense = timed(prefill=[100.0, 50.0, 100.0, 100.0, 90.0, 80.0], decode=[10.0] * 6)
    slow = timed(prefill=[120.0, 60.0, 130.0, 121.0, 110.0, 95.0], decode=[9, 8, 9, 8.5, 8, 9.5])
    report["throughput"] = {"dense": dense, "compressed": slow}
    said = " ".join(terminal_text(report).split())
    assert "slower than the dense model in decode" in said.partition("keeps")[0]
    assert "at batch 16 prefill faster (1.21\u00d7), decode slower (0.88\u00d7)." in said
    assert "0.88\u00d7, slower" in said
    assert "prefill at batch 16 1.19 to 1.30\u00d7; decode at batch 16 0.80 to 0.95\u00d7." in said
    assert "too noisy" not in said
    assert "0.88\u00d7, slower" in render_page(report)
    assert "Slower than the dense model in decode." in render_page(report)


def test_a_speed_on_which_the_rounds_disagree_is_too_noisy_to_say() -> None:
    report = report_without_plots()
    noisy = timed(prefill=[24_310.0] * 6, decode=[431.5] * 5 + [400.0])
    report["throughput"]["compressed"] = noisy
    said = " ".join(terminal_text(report).split())
    assert "at batch 16 prefill faster (1.13\u00d7), decode too noisy to say." in said
    assert "An interval that holds 1 is too noisy to say." in said
    assert "slower" not in said + render_page(report)
    assert f"{numbers.decimal(431.5)} too noisy to say" in said


def test_it_says_whose_statistics_were_taken() -> None:
    report = report_without_plots() | {"statistics": {"reused_from": "runs/base"}}
    for text in (render_page(report), terminal_text(report)):
        assert "Statistics were reused from runs/base" in text.replace("<wbr>", "")
    assert "Statistics were reused" not in terminal_text(sample_report())


@pytest.mark.parametrize(
    ("used", "words"), [(True, "refitted layers are used"), (False, "drafted layers are kept")]
)
def test_a_second_pass_says_what_it_found_and_what_is_used(used: bool, words: str) -> None:
    losses = {"dense": 2.5, "drafted": 3.25, "refitted": 2.88}
    report = report_without_plots() | {"refit": {"held_out_perplexity": losses, "used": used}}
    for text in (render_page(report), " ".join(terminal_text(report).split())):
        assert words in text
        assert "2.88" in text
        assert "3.25" in text


def test_defaults_of_the_recipe_are_marked() -> None:
    page = sample_page().replace("<wbr>", "")
    row = re.search(r"<tr><th[^>]*>method\.pca_on</th>.*?</tr>", page)
    assert row
    assert "default" in row.group()
    assert "All 12 keys, 6 at their default" in page


def test_the_terminal_names_the_checkpoint_the_report_and_how_to_load_it() -> None:
    text = terminal_text(sample_report(), width=120)
    assert "READY" in text
    assert "runs/tiny-slicegpt/report.html" in text
    assert "from_pretrained('runs/tiny-slicegpt/model', trust_remote_code=True)" in text
    assert max(map(len, terminal_text(sample_report(), width=60).splitlines())) <= 60


def test_a_native_checkpoint_loads_without_code_of_its_own() -> None:
    report = minimal_report()
    report["method"]["native"] = True
    assert "trust_remote_code" not in render_page(report)
    assert "trust_remote_code" not in terminal_text(report)


def test_one_basis_for_all_sites_is_drawn_under_its_name() -> None:
    report = minimal_report()
    shared = sample_sites(1, 128, 96)[0] | {"where": "all sites"}
    report["sites"] = [shared]
    page = render_page(report)
    assert "0 \u00b7 all sites" in page
    assert page.count("<svg") == 4


def test_bars_that_no_eye_can_part_are_one_and_busy_time_counts_once() -> None:
    work = [
        Span(worker="w", unit=str(i), kind="layer", start=i * 0.01, end=i * 0.01 + 0.005)
        for i in range(20_000)
    ]
    bars = timeline.merged(work, total=200.0)
    assert len(bars) <= timeline.MAX_BARS
    assert (bars[0].start, bars[-1].end) == (work[0].start, work[-1].end)
    assert timeline.busy_fraction(work) == pytest.approx(0.5, abs=1e-3)
    assert timeline.busy_fraction([*work, *work]) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.short_count(1_239_040), "1.24 M"),
        (numbers.short_count(6_738_415_616), "6.74 B"),
        (numbers.bytes_text(999), "999 B"),
        (numbers.bytes_text(4_961_280), "4.96 MB"),
        (numbers.seconds_text(0.418), "0.42 s"),
        (numbers.seconds_text(200), "3 min 20 s"),
        (numbers.seconds_text(7_500), "2 h 05 min"),
        (numbers.kept_percent(0.99991), "99.99 %"),
        (numbers.kept_percent(1.0), "100.0 %"),
        (numbers.change(0.8472), "\u221215.3 %"),
        (numbers.change(1.00001), "0.0 %"),
        (numbers.change(None), "\u2013"),
        (numbers.decimal(float("inf")), "\u2013"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, expected: str) -> None:
    assert text.replace("\u00a0", " ") == expected


def test_a_worker_over_its_plan_is_named_on_the_page_and_on_the_terminal():
    report = report_without_plots()
    report["memory"]["workers"] = {"worker-0": 296_000_000, "worker-1": 148_000_000}
    report["memory"]["planned_worker_bytes"] = 140_000_000
    line = "worker-0 exceeds its plan: 140 MB planned, 296 MB measured (+111.4 %)"
    console = Console(width=200, color_system=None, file=io.StringIO())
    console.print(render_terminal(report))
    for text in (console.file.getvalue(), render_page(report)):
        assert line in text.replace("\u00a0", " ").replace("<wbr>", "")
        assert "worker-1 exceeds" not in text


def test_too_few_calibration_tokens_are_said_beside_the_result():
    said = "56 calibration tokens are fewer than the width of the Gram matrix at attn_in 64"
    assert summary.statistics_note({"statistics": {"few_tokens": [said]}}) == f"Warning: {said}."
    assert summary.statistics_note({"statistics": {"few_tokens": []}}) == ""


def test_every_kind_of_unit_is_drawn_in_a_colour_that_is_not_that_of_what_is_no_unit():
    slots = {name: timeline.slot_of(name) for name in KINDS}
    unknown = timeline.slot_of("what no run does")
    assert unknown not in slots.values()
    assert slots["carried"] == slots["statistics"]
    assert slots["losses"] == slots["damage"] not in {slots[name] for name in ("layer", "basis")}


def test_ticks_are_round_numbers_inside_the_range():
    assert ticks((0.0, 105.0), most=4) == [0.0, 50.0, 100.0]
    assert ticks((0.91, 1.004), most=5) == pytest.approx([0.92, 0.94, 0.96, 0.98, 1.0])
    assert ticks((-0.6, 4.6), most=12, whole=True) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert ticks((-0.6, 0.6), most=8, whole=True) == [0.0]


def quantised_report() -> dict[str, Any]:
    """Return the sample report of a result whose layers have 3 and 4 bits."""
    report = sample_report()
    report["parameters"] |= {"after": report["parameters"]["before"], "keep_fraction": 1.0}
    report["target"] |= {"slice": None, "keep_bytes": 900_000, "actual_keep_fraction": 1.0}
    report["storage"] = {
        "before": 4_956_160,
        "after": 880_640,
        "kinds": [
            {"kind": "embedding", "before": 262_144, "after": 262_144},
            {"kind": "MLP", "before": 4_694_016, "after": 618_496},
        ],
        "bits": {"before": 32.0, "after": 3.81, "of_input": 3.81},
        "dtype": {"before": "float32", "after": "float32"},
        "quantised": True,
        "tables": {"head": {"scheme": "8/128", "bits": 8}},
        "unquantised": ["embedding", "norms and the rest"],
    }
    for layer in report["layers"]:
        bits = 4 if layer["layer"] == 4 else 3
        layer["matrices"] = [
            {"name": name, "rows": 64, "width": 128, "scheme": f"{bits}/32", "bits": bits,
             "error": 0.01, "nearest": 0.02, "factor": "cholesky"}
            for name in ("q_proj", "down_proj.first")
        ]  # fmt: skip
    report["layers"][2]["matrices"][0]["factor"] = "cholesky damped 1e-08"
    report["layers"][1]["matrices"].append({"name": "o_proj", "rows": 128, "width": 64})
    return report


def test_a_quantised_result_is_headed_by_bytes_and_bits_not_by_parameters() -> None:
    text = terminal_text(quantised_report(), width=400).replace("\N{NO-BREAK SPACE}", " ")
    assert "stores the weights in 881 kB instead of 4.96 MB (17.8 %), 3.810 bits a weight" in text
    assert "1,239,040" not in text
    assert "of the parameters" not in text
    assert "Requested at most 900,000 bytes of weights; they take 880,640" in text
    assert "Not quantised, in float32: embedding, norms and the rest. --dtype bfloat16" in text
    assert "cholesky damped 1e-08: layer 2 q_proj" in text
    assert "pip install compressed-tensors" in render_page(quantised_report())


def test_layers_that_are_alike_share_a_row_of_the_map_of_bits() -> None:
    report = quantised_report()
    for layer in report["layers"]:
        layer["widths"]["intermediate"] = 352
    blocks = read_layers(report)
    plot = bits.heat_map(report, blocks)
    assert plot is not None
    rows = re.findall(r">(\d+(?:\u2013\d+)?|embed|head)</text>", plot.wide)
    assert [row for row in rows if row not in ("128", "352")][:5] == [
        "0",
        "1",
        "2\u20133",
        "4",
        "head",
    ]
    assert plot.wide.count(">3/32</text>") == 6
    assert plot.wide.count(">4/32</text>") == 2
    assert [name for name, *_ in plot.words.legend] == [
        "3 bits",
        "4 bits",
        "8 bits",
        "not quantised",
    ]
    assert bits.heat_map(sample_report(), read_layers(sample_report())) is None


def test_a_page_shows_bytes_by_kind_and_the_errors_of_each_matrix() -> None:
    page = render_page(quantised_report()).replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(r'<th scope="row">MLP</th><td class="num">4.69 MB</td>', page)
    assert re.search(r'<th scope="row">all tensors</th><td class="num">4.96 MB</td>', page)
    row = r"<td>q_proj</td>.*?3/32</td><td class=\"num\">1.000 %</td><td class=\"num\">2.000 %</td>"
    assert re.search(row, page)
    assert "rounding-wide-title" in page


def test_a_quantised_result_is_held_against_uniform_bits_and_advised_in_bits() -> None:
    report = quantised_report()
    report["evaluation"]["compressed"]["perplexity"] = 9.0
    found = summary.advice(report)
    assert any("--bits 4" in each for each in found)
    assert not any("--keep-fraction" in each for each in found)
