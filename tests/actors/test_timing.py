"""Models are timed at all settings, what they decode is the same in each, and kernels are named."""

import dataclasses
import math

import pytest
import torch

from actors.messages import ThroughputRequest
from actors.worker.attention_kernels import AttentionKernels
from actors.worker.timing import Generation, Setting, timed
from planners.timing import COMPILED, EAGER, FEWEST_ROUNDS
from tests.families.test_result_code import narrow_result
from tests.families.tiny import config_of, model_of

REQUEST = ThroughputRequest(
    uris={}, prompt=8, batches=(1, 2), new_tokens=4, max_rounds=FEWEST_ROUNDS, seconds=0.0
)
of_torch_itself = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def models():
    config = config_of("llama")
    return {"dense": model_of(config, dtype=torch.float32), "narrow": narrow_result(config)[0]}


@torch.no_grad()
def test_every_setting_has_a_row_with_its_rounds_and_its_own_memory(models):
    found = timed(models, REQUEST)
    for values in found.values():
        assert [(row["batch"], row["mode"]) for row in values["settings"]] == [
            (1, EAGER),
            (2, EAGER),
        ]
        for row in values["settings"]:
            assert len(row["rounds"]) == FEWEST_ROUNDS
            fastest = [max(each) for each in zip(*row["rounds"], strict=True)]
            speeds = row["prefill_tokens_per_second"], row["decode_tokens_per_second"]
            assert 0 < speeds[0] <= fastest[0]
            assert 0 < speeds[1] <= fastest[1]
            assert row["peak_bytes"] > 0
        assert {part: len(names) for part, names in values["kernels"].items()} == {
            "prefill": 2,
            "decode": 2,
        }


@torch.no_grad()
def test_a_batch_that_would_take_too_long_is_left_out_and_says_so(models):
    request = dataclasses.replace(REQUEST, batches=(1, 10**6), patience=1.0)
    for values in timed(models, request).values():
        first, second = values["settings"]
        assert "not_measured" not in first
        assert second["not_measured"].startswith("would take about ")


@of_torch_itself
@torch.no_grad()
def test_where_nothing_compiles_the_reason_stands_in_place_of_a_speed(models):
    request = dataclasses.replace(REQUEST, batches=(1,), compiled=(1,))
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/compiler")}):
        (eager, compiled) = timed({"dense": models["dense"]}, request)["dense"]["settings"]
    assert "not_measured" not in eager
    assert compiled["mode"] == COMPILED
    assert "No working C++ compiler" in compiled["not_measured"]


@pytest.mark.nightly  # compiles for half a minute
@of_torch_itself
@torch.no_grad()
def test_a_compiled_step_gives_the_tokens_of_the_model_as_it_is(models):
    for model in models.values():
        tokens = [
            Generation(model, REQUEST, Setting(batch=2, mode=mode)).tokens()
            for mode in (EAGER, COMPILED)
        ]
        assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("qk", "vo", "kernel"), [(16, 16, "flash"), (16, 12, "math"), (12, 16, "math")]
)
def test_a_cpu_has_a_fused_kernel_for_heads_of_one_width(qk, vo, kernel):
    query, key, value = (torch.randn(1, 2, 4, width) for width in (qk, qk, vo))
    with AttentionKernels() as noted:
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.nn.functional.silu(query)  # of no interest
    assert noted.names == [kernel]
    weights = (query @ key.mT / math.sqrt(qk)).masked_fill(
        torch.ones(4, 4).triu(1).bool(), -math.inf
    )
    torch.testing.assert_close(found, weights.softmax(-1) @ value)


@torch.no_grad()
def test_prompts_of_a_result_with_unequal_heads_pass_the_fused_kernel(models):
    heads = [(f["qk_head_dim"], f["vo_head_dim"]) for f in models["narrow"].config.layer_forms]
    assert all(qk != vo for qk, vo in heads)
    kernels = Generation(models["narrow"], REQUEST, Setting(batch=2, mode=EAGER)).kernels()
    assert kernels["prefill"] == ["flash", "flash"]
