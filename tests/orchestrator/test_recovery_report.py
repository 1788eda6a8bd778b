"""What a report shows of a recovery: a note, the curve of the losses, errors by layer, tables."""

import re
from typing import Any

import pytest

from orchestrator.report import render_page, summary, training
from orchestrator.report.sparkline import BLOCKS, averaged, sparkline
from tests.orchestrator.test_report import Page, report_without_plots, terminal_text

STEP_TOKENS = 2048


def recovered(mode: str = "global", **changes: Any) -> dict[str, Any]:
    """Return a report of a result that was trained, without its other plots."""
    return report_without_plots() | {
        "recovery": {
            "mode": mode,
            "loss": "kl",
            "trains": "made",
            "data": "calibration",
            "tokens": 32 * STEP_TOKENS,
            "used": True,
            "num_tokens": 4080,
            "held_out_perplexity": {"before": 3.16, "after": 2.93},
            "rates": [],
            "rate": None,
            "curve": [],
            "held_out_curve": [],
            "layers": [],
            "nothing": [],
            **changes,
        }
    }


def trained_globally(*, steps: int = 32, **changes: Any) -> dict[str, Any]:
    return recovered(
        rates=[{"rate": 0.01, "loss": 0.31}, {"rate": 0.003, "loss": None}],
        rate=0.01,
        curve=[[(n + 1) * STEP_TOKENS, 0.4 - 0.1 * n / steps] for n in range(steps)],
        held_out_curve=[[n * steps * STEP_TOKENS // 4, 0.42 - 0.02 * n] for n in range(5)],
        **changes,
    )


def trained_locally() -> dict[str, Any]:
    return recovered(
        "local",
        layers=[
            {"layer": 0, "before": 0.12, "after": 0.08, "rate": 0.01, "kept": True},
            {"layer": 1, "before": None, "after": None, "rate": None, "kept": False},
            {"layer": 2, "before": 0.2, "after": 0.2, "rate": 0.003, "kept": False},
        ],
        nothing=["embedding", "final norm", "head"],
    )


def note(report: dict[str, Any]) -> str:
    return training.recovery_note(report).replace("\u00a0", " ")


def test_the_note_says_how_it_was_trained_and_what_that_brought() -> None:
    report = trained_globally()
    assert note(report) == (
        "Recovery, global, on 65,536 tokens of the calibration data (rate 0.01 of 0.01 and 0.003): "
        "held-out perplexity 2.930 instead of 3.160; the trained model is used."
    )
    for text in (render_page(report).replace("<wbr>", ""), terminal_text(report, width=400)):
        assert "held-out perplexity 2.930 instead of 3.160" in text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"used": False}, "no better, so the model is as it was before."),
        ({"held_out_perplexity": {"before": 3.16, "after": None}, "used": False},
         "held-out perplexity that is not finite instead of 3.160"),
        ({"loss": "labels", "trains": "lora"},
         "Recovery, global, on the text itself, low-rank changes of its linears, on 65,536"),
        ({"data": "self"}, "tokens of text that the dense model wrote (rate 0.01"),
        ({"data": "s3://b/text.jsonl?endpoint_override=h"}, "tokens of s3://b/text.jsonl (rate"),
        ({"rates": []}, "(rate 0.01)"),
    ],
)  # fmt: skip
def test_the_note_follows_what_was_asked_for(changes: dict[str, Any], words: str) -> None:
    report = trained_globally()
    report["recovery"] |= changes
    assert words in note(report)


def test_a_local_recovery_counts_the_better_layers_and_names_what_was_not_trained() -> None:
    said = note(trained_locally())
    assert "calibration data: error lower in 1 of 3 layers; held-out perplexity" in said
    assert said.endswith(" Nothing local to learn in embedding, final norm and head.")


@pytest.mark.parametrize(
    ("report", "plot", "tables"),
    [
        (trained_globally(), "training", ["losses", "rates that were tried"]),
        (trained_locally(), "recovered", ["trained layers"]),
    ],
    ids=["global", "local"],
)
def test_the_page_has_a_section_with_one_plot_and_its_numbers(report, plot, tables) -> None:
    page = render_page(report)
    elements = Page(page)
    assert len(re.findall(r"<svg.*?</svg>", page, re.DOTALL)) == 2
    ids = elements.values("id")
    assert len(ids) == len(set(ids))
    assert {f"{plot}-wide-title", f"{plot}-narrow-desc", "recovery"} <= set(ids)
    section = re.search(r'<section id="recovery".*?</section>', page, re.DOTALL)
    assert section
    titles = re.findall(r"<summary>Table of the (.*?)</summary>", section.group())
    assert titles == tables


def test_the_curve_marks_the_weights_that_are_taken() -> None:
    falling = training.curve(trained_globally())
    assert falling is not None
    assert "stroke:var(--ink)" not in falling.wide
    assert "are taken: 0.3400, from 0.4200" in falling.words.caption
    early = trained_globally()
    early["recovery"]["held_out_curve"][-1][1] = 0.5
    plot = training.curve(early)
    assert plot is not None
    assert "stroke:var(--ink)" in plot.wide
    assert "at the dashed line, are taken: 0.3600" in plot.words.caption
    worse = trained_globally()
    worse["recovery"]["held_out_curve"] = [[0, 0.4], [STEP_TOKENS, 0.5]]
    plot = training.curve(worse)
    assert plot is not None
    assert "so its weights stay" in plot.words.caption


def test_a_long_training_is_drawn_by_means_and_steps_without_a_loss_are_left_out() -> None:
    report = trained_globally(steps=3000)
    report["recovery"]["curve"][7][1] = None
    plot = training.curve(report)
    assert plot is not None
    assert "the mean of 13 steps" in plot.words.caption
    assert max(path.count("L") for path in re.findall(r'd="(.*?)"', plot.wide)) < 240
    assert "logarithmic" not in plot.words.caption
    report["recovery"]["curve"][0][1] = 4.0
    wide = training.curve(report)
    assert wide is not None
    assert "logarithmic scale" in wide.words.caption


def test_the_tables_have_the_mean_training_loss_between_two_measurements() -> None:
    losses, rates = training.tables(trained_globally(steps=4))
    assert losses.rows[0] == ("0", "\u2013", "0.4200", "\u2013")
    assert losses.rows[1][:3] == ("2,048", "0.4000", "0.4000")
    assert rates.rows == (("0.01", "0.3100", "yes"), ("0.003", "\u2013", "no"))
    (layers,) = training.tables(trained_locally())
    assert [row[0] for row in layers.rows] == ["0", "1", "2"]
    assert layers.rows[1] == ("1", *["\u2013"] * 5)
    assert [row[-1] for row in layers.rows] == ["yes", "\u2013", "no"]


@pytest.mark.parametrize("found", [{}, {"recovery": None}])
def test_a_run_without_recovery_shows_nothing_of_it(found) -> None:
    report = report_without_plots() | found
    assert training.recovery_note(report) == ""
    assert 'id="recovery"' not in render_page(report)


def test_training_is_advised_where_it_was_not_done_and_the_model_can_be_trained() -> None:
    report = report_without_plots()
    report["evaluation"]["compressed"]["perplexity"] = 8.9
    assert any("--recover global" in each for each in summary.advice(report))
    large = report | {"parameters": {"before": 7e9, "after": 5.6e9}}
    assert any("--recover local" in each for each in summary.advice(large))
    steps = report | {"method": {"steps": [{"name": "svdllm"}, {"name": "modegpt"}]}}
    assert any("--recover global" in each for each in summary.advice(steps))
    quantised = report | {"storage": {"quantised": True, "bits": {"of_input": 3.0}}}
    done = report | {"recovery": trained_globally()["recovery"]}
    for other in (quantised, done):
        assert summary.advice(other)
        assert not any("--recover" in each for each in summary.advice(other))


def test_a_sparkline_is_tallest_at_the_largest_value_and_fits_its_width() -> None:
    assert sparkline([3.0, 1.0, 2.0], width=8) == "\u2588\u2581\u2585"
    assert sparkline([2.0, 2.0], width=8) == BLOCKS[0] * 2
    assert sparkline([], width=8) == ""
    assert len(sparkline(list(range(100)), width=8)) == 8


def test_means_of_neighbours_keep_their_order_and_their_sum() -> None:
    values = [float(n) for n in range(12)]
    means = averaged(values, most=4)
    assert means == [1.0, 4.0, 7.0, 10.0]
    assert averaged(values[:3], most=4) == values[:3]
