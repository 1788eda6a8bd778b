"""Whether what a result lost is usual: by published and measured numbers, and what to try."""

import io
import math

import pytest
from rich.console import Console

from orchestrator.report import render_page, render_terminal
from orchestrator.report.quality import BROKEN, FINE, judged, quality, quality_text
from tests.orchestrator.test_report import report_without_plots

SMOL = 134_515_008
SEVEN_B = 6_738_415_616


def read(before, after, *, kept=0.8, parameters=SMOL, method="modegpt"):
    found = judged(before, after, kept=kept, parameters=parameters, names=[method])
    return found.word, found.tone


@pytest.mark.parametrize(
    ("result", "word", "tone"),
    [
        # one line for each number of which the table was made, and those that must not pass as good
        (read(5.12, 6.16, parameters=SEVEN_B), "usual for this size", "good"),
        (read(5.12, 8.41, kept=0.6, parameters=SEVEN_B), "usual for this size", "cost"),
        (read(5.47, 8.12, kept=0.785, parameters=SEVEN_B, method="slicegpt"),
         "usual for this size", "cost"),
        (read(5.12, 8.12, parameters=SEVEN_B), "worse than usual", "cost"),
        (read(26.30, 37.45), "usual for this size", "cost"),
        (read(26.30, 45.10), "worse than usual", "cost"),  # the published allocation
        (read(26.30, 92.07, method="svdllm"), "usual for this size", "cost"),
        (read(2.547, 2.576, parameters=936_448), "close to the dense model", "good"),
        (read(2.547, 3.38, parameters=936_448, method="slicegpt"), "usual for this size", "cost"),
        (read(26.30, 264.0), "broken", "bad"),
        (read(26.30, math.inf), "broken", "bad"),
        (read(26.30, 25.0), "close to the dense model", "good"),
        (read(26.30, 30.0, kept=1.0), "worse than usual", "cost"),  # nothing was removed
        (read(26.30, 200.0, method="of-tomorrow"), "usual for this size", "cost"),
    ],
)  # fmt: skip
def test_a_loss_is_held_against_what_is_usual_for_method_and_size(result, word, tone):
    assert result == (word, tone)


def test_twice_the_perplexity_is_never_green():
    for method in ("modegpt", "slicegpt", "svdllm", "of-tomorrow"):
        for parameters in (1e6, SMOL, SEVEN_B):
            for kept in (0.05, 0.3, 0.5, 0.8, 0.95):
                _, tone = read(10.0, 20.0, kept=kept, parameters=parameters, method=method)
                assert tone != "good"
    assert FINE < math.log(2) < BROKEN


def test_more_removed_is_never_held_against_less():
    fractions = [n / 100 for n in range(101)]
    for parameters in (SMOL, SEVEN_B):
        for method in ("modegpt", "slicegpt", "svdllm"):
            usual = [
                judged(1.0, 1.1, kept=1 - removed, parameters=parameters, names=[method]).usual_nats
                for removed in fractions
            ]
            assert usual == sorted(usual)
            assert usual[0] == 0


def bad_report(method="slicegpt", **options):
    report = report_without_plots()
    report["evaluation"]["compressed"]["perplexity"] = 8.9
    report["method"]["steps"] = [{"name": method, "options": options, "modules": []}]
    return report


@pytest.mark.parametrize(
    ("report", "advice"),
    [
        (bad_report(), ["--method modegpt --keep-fraction 0.85", "--recover global", "32.8",
                       "--keep-fraction 0.9"]),
        (bad_report("modegpt", allocation="uniform", refit=False),
         ["allocation=marginal", "--recover global", "refit=true", "--keep-fraction 0.9"]),
        (bad_report("modegpt", allocation="marginal", refit=True),
         ["candidates=modegpt,svdllm", "--recover global", "32.8", "--keep-fraction 0.9"]),
        (bad_report("modegpt", allocation="marginal", servable="native", refit=True),
         ["--recover global", "32.8", "--keep-fraction 0.9"]),
    ],
)  # fmt: skip
def test_what_to_try_is_what_this_run_has_not_done(report, advice):
    found = quality(report).advice
    assert len(found) == len(advice)
    for said, words in zip(found, advice, strict=True):
        assert words in said


def test_ready_at_twice_the_perplexity_is_ready_but_not_green():
    report = bad_report()
    console = Console(width=100, color_system="standard", force_terminal=True, file=io.StringIO())
    console.print(render_terminal(report))
    said = console.file.getvalue()
    assert "\x1b[1;7;33m READY " in said
    assert "usual for slicegpt at this size, but far from the dense model" in said
    assert "try --method modegpt" in said
    page = render_page(report)
    assert '<span class="verdict cost">READY</span>' in page
    assert "usual for slicegpt at this size, but far" in page
    assert "<li>--method modegpt --keep-fraction 0.85" in page


def test_a_good_result_is_green_and_needs_no_advice():
    report = report_without_plots()
    found = quality(report)
    assert (found.tone, found.advice) == ("good", [])
    assert '<span class="verdict good">READY</span>' in render_page(report)


def test_a_toy_is_called_one():
    assert "can only compare methods" in quality_text(quality(report_without_plots()), ["slicegpt"])


def test_where_nothing_was_measured_nothing_is_said():
    report = report_without_plots()
    del report["evaluation"]["compressed"]
    assert quality(report) is None
    render_page(report)
