"""Verdicts on speed, and the reasons that are given where a result is slower."""

import pytest

from orchestrator.report import speed

FACTS = {
    "dtype": "bfloat16", "parameters": 1.7e9, "layer_parameters": 0.7e9, "heads": [[128, 128]] * 4,
    "uneven": [], "low_rank": 0, "shortcuts": 0,
}  # fmt: skip
FLASH = {"prefill": ["flash"] * 4, "decode": ["flash"] * 4}


def measured(rates, *, batch=16, mode="eager", kernels=FLASH, device="cuda", **facts):
    """Return what was measured of a model in one setting, at one rate in prefill and decode."""
    row = {
        "batch": batch,
        "mode": mode,
        "prefill_tokens_per_second": rates[0],
        "decode_tokens_per_second": rates[0],
        "rounds": [[rate, rate] for rate in rates],
    }
    return {"settings": [row], "kernels": kernels, "device": device, "facts": FACTS | facts}


DENSE = measured([100.0] * 6, parameters=2e9, layer_parameters=1e9)


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ([110, 120, 115, 101, 130, 125], speed.FASTER),
        ([90, 80, 99, 95, 70, 85], speed.SLOWER),
        ([110, 120, 115, 99, 130, 125], speed.NOISE),
        ([110, 120, 115, 101, 130], speed.NOISE),  # too few
        ([110, 120, 115, 101, 130, 125, 120, 122, 99], speed.FASTER),  # one round of nine
    ],
)
def test_the_verdict_is_that_of_the_interval(rates, verdict):
    both = speed.compared(measured([100] * len(rates)), measured(rates))
    assert [found.verdict for found in both] == [verdict] * 2
    assert (speed.headline(both) != "") == (verdict == speed.SLOWER)


def test_ratios_are_those_of_rounds_so_that_a_slow_phase_does_not_count():
    slowing = [100.0, 50.0, 20.0, 10.0, 5.0, 2.0]
    (prefill, _) = speed.compared(measured(slowing), measured([1.1 * rate for rate in slowing]))
    assert prefill.verdict == speed.FASTER
    assert prefill.ratio == pytest.approx(1.1)


def test_settings_that_only_one_model_has_are_not_compared():
    assert speed.compared(DENSE, measured([90] * 6, batch=8)) == ()
    left_out = {"settings": [{"batch": 16, "mode": "eager", "not_measured": "too large"}]}
    assert speed.compared(DENSE, left_out) == ()
    assert speed.compared({}, {}) == ()


def reasons(result, dense=DENSE):
    return speed.reasons(speed.compared(dense, result), dense, result)


def test_a_faster_result_needs_no_reasons():
    assert reasons(measured([120] * 6, shortcuts=4, low_rank=8)) == []


def test_heads_without_a_fused_kernel_are_named_with_their_layers_and_widths():
    heads = [[128, 128], [90, 91], [90, 91], [88, 96]]
    kernels = {"prefill": ["flash", "math", "math", "efficient"], "decode": ["flash"] * 4}
    (said,) = reasons(measured([60] * 6, kernels=kernels, heads=heads))
    assert "prefill in layers 1-2: heads of width 90 (q/k) and 91 (v/o)" in said
    assert "the dense model gets flash" in said


def test_a_dense_model_without_fused_kernels_is_no_reason():
    plain = {part: ["math"] * 4 for part in ("prefill", "decode")}
    assert reasons(measured([60] * 6, kernels=plain), {**DENSE, "kernels": plain}) == []


def test_widths_that_a_gpu_has_slow_kernels_for_are_named_in_16_bits_only():
    uneven = [{"what": "FFN", "width": 8193, "layers": [0, 2, 3]}]
    (said,) = reasons(measured([60] * 6, uneven=uneven))
    assert said.endswith("FFN 8193 in layers 0, 2-3")
    assert reasons(measured([60] * 6, uneven=uneven, dtype="float32")) == []
    many = [{"what": "rank", "width": width, "layers": [0]} for width in (9, 10, 11, 12, 13)]
    (said,) = reasons(measured([60] * 6, uneven=many))
    assert said.endswith("rank 11 in layer 0; and 2 more")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"low_rank": 28}, "low rank"),
        ({"shortcuts": 4}, "multiply the residual stream"),
        ({"changed": 14}, "14\u00a0linears multiply by the matrix of another layer"),
        ({"layer_parameters": 0.97e9}, "90\u00a0% of what was removed is in the embedding"),
        ({"device": "cpu", "parameters": 1e6, "layer_parameters": 0}, "on a CPU"),
    ],
)
def test_each_known_reason_is_given_where_it_holds(facts, words):
    (said,) = reasons(measured([60] * 6, **facts))
    assert words in said


def test_kernels_are_listed_by_widths():
    heads = [[128, 128], [96, 88], [96, 88], [96, 88]]
    kernels = {"prefill": ["flash", *["efficient"] * 3], "decode": ["math"] * 4}
    said = speed.kernels_text(measured([60], kernels=kernels, heads=heads))
    assert said == (
        "prefill flash (128/128); prefill efficient (96/88); decode math (128/128, 96/88)"
    )
    assert speed.kernels_text({}) == ""


@pytest.mark.parametrize(
    ("layers", "text"),
    [([3], "layer 3"), ([0, 1, 2], "layers 0-2"), ([0, 2, 3, 7], "layers 0, 2-3, 7")],
)
def test_layers_are_listed_in_ranges(layers, text):
    assert speed.layers_text(layers) == text
