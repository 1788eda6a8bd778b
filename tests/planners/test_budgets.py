"""Budgets of time and memory, steps that kernels like, and widths for what serves a result."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import methods
from orchestrator.recipe.config import bytes_of
from orchestrator.recipe.method_options import resolve_options
from planners.budget.budgets import budget_of
from planners.budget.served import WORTH, pair_order, predicted
from planners.budget.steps import rank_step, width_steps
from planners.errors import PlanError
from planners.method import Target
from planners.model.cost import dense_start, layer_parameters, model_parameters
from planners.model.serving_load import LayerTimes, ServingLoad, seconds_at
from planners.serving import VLLM_HEAD_DIMS
from tests.shapes import llama_shape

LARGE = llama_shape(
    family="llama", model_type="llama", num_layers=3, hidden=512, intermediate=1536, num_heads=8,
    num_kv_heads=8, head_dim=64, vocab_size=1000, tied=False, dtype="bfloat16",
)  # fmt: skip
MODEGPT = methods.spec("modegpt")
START = dense_start(LARGE)
TIMES = LayerTimes(
    mlp=((384, 10e-6), (768, 14e-6), (1152, 19e-6), (1536, 24e-6)),
    heads=((16, 9e-6), (32, 12e-6), (48, 16e-6), (64, 20e-6)),
    outside=5e-6,
)


def options_of(name="modegpt", **given):
    return resolve_options(methods.spec(name), given)


def curve(full, step, by):
    widths = [full, *range(full - step, full // 8, -step)]
    return [[w, by * (1 - w / full) ** 2] for w in widths]


def findings(*, pairs=1.5, scale=(1.0, 2.0, 3.0)):
    """Return damage curves of three layers; pairs shared by all heads cost so much more."""
    found = []
    for factor in scale:
        qk = curve(64, 8, 0.1 * factor)
        curves = {
            "mlp": curve(1536, 192, 0.3 * factor),
            "qk": qk,
            "vo": curve(64, 8, 0.2 * factor),
            "pairs": [[w, d * pairs] for w, d in qk],
        }
        found.append({"curves": curves, "pair_scores": [1 / (1 + pair) for pair in range(32)]})
    return found


def allocated(target, **given):
    options = options_of(**given)
    assert MODEGPT.refuses(LARGE, options) == ""
    return MODEGPT.allocate(LARGE, START, target, options, findings())


def widths_of(form):
    return [(x.intermediate, x.qk_head_dim, x.vo_head_dim) for x in form.layers]


@pytest.mark.parametrize("keep_fraction", [0.9, 0.8, 0.65])
def test_kept_widths_of_every_method_are_multiples_of_eight(keep_fraction):
    target = Target(keep_fraction=keep_fraction)
    for servable in ("remote", "auto"):
        form = allocated(target, servable=servable).form
        assert all(width % 8 == 0 for widths in widths_of(form) for width in widths)
    for how in ("uniform", "influence"):
        spec, options = MODEGPT, options_of(allocation=how)
        form = spec.form(LARGE, START, target, options)
        assert all(width % 8 == 0 for widths in widths_of(form) for width in widths)
    svdllm = methods.spec("svdllm")
    form = svdllm.form(LARGE, START, target, options_of("svdllm"))
    ranks = [rank for layer in form.layers for rank in layer.ranks.values()]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)
    slicegpt = methods.spec("slicegpt")
    form = slicegpt.form(LARGE, START, Target(slice=0.3), options_of("slicegpt"))
    assert form.embedding_dim % 8 == 0


def test_small_models_keep_their_fine_steps():
    small = replace(LARGE, hidden=64, intermediate=96, head_dim=16)
    assert width_steps(small, options_of()) == {"mlp": 8, "qk": 2, "vo": 1, "residual": 8}
    assert rank_step((64, 96), options_of("svdllm")) == 1


@given(multiple=st.sampled_from([1, 2, 8, 16, 64, 128]), gpus=st.sampled_from([1, 2, 4, 8]))
def test_the_part_of_each_gpu_is_a_multiple_too(multiple, gpus):
    options = options_of(multiple_of=multiple, tensor_parallel=gpus)
    step = width_steps(LARGE, options)
    assert step["mlp"] % (gpus * multiple) == 0
    for module, heads in (("qk", LARGE.num_heads), ("vo", LARGE.num_kv_heads)):
        assert heads // gpus * step[module] % multiple == 0
        assert step[module] % min(multiple, 8) == 0


def test_eight_gpus_divide_every_sharded_width_of_a_result():
    form = allocated(Target(keep_fraction=0.8), tensor_parallel=8, servable="remote").form
    for intermediate, qk, vo in widths_of(form):
        assert intermediate % 64 == 0
        assert qk % 8 == vo % 8 == 0
    reason = MODEGPT.refuses(LARGE, options_of(tensor_parallel=3))
    assert "tensor_parallel is 3, by which its 8 heads" in reason


def test_a_time_between_two_widths_is_on_the_line_and_never_below_a_narrower_one():
    assert seconds_at(TIMES.mlp, 960) == pytest.approx(16.5e-6)
    bumpy = ((384, 10e-6), (768, 9e-6), (1536, 20e-6))
    assert seconds_at(bumpy, 768) == 10e-6
    assert seconds_at(TIMES.heads, 64) == 20e-6


@pytest.mark.parametrize("servable", ["auto", "remote", "narrow_heads", "vllm"])
def test_a_speed_up_is_met_by_the_times_of_layers_with_heads_of_one_width(servable):
    target = Target(speedup=1.2, times=TIMES)
    form = allocated(target, servable=servable).form
    assert all(layer.qk_head_dim == layer.vo_head_dim for layer in form.layers)
    spent = TIMES.outside + sum(TIMES.layer(x.intermediate, x.qk_head_dim) for x in form.layers)
    whole = TIMES.outside + 3 * TIMES.layer(1536, 64)
    assert whole / spent >= 1.2


def test_a_speed_up_out_of_reach_is_refused_with_the_nearest():
    with pytest.raises(PlanError, match="cannot be reached") as caught:
        allocated(Target(speedup=9.0, times=TIMES))
    nearest = float(caught.value.hint.split()[2])
    allocated(Target(speedup=nearest, times=TIMES))


def test_a_memory_to_fit_counts_weights_keys_and_values_and_workspace():
    load = ServingLoad(batch=4, context=1000)
    weights = 2 * model_parameters(LARGE, START.form)
    cached = 4 * 1000 * 3 * 2 * 8 * 64 * 2
    target = Target(fit=weights + cached + 12345, load=load, workspace=12345)
    assert budget_of(LARGE, START, target).cost(START.form) == target.fit
    smaller = replace(target, fit=int(target.fit * 0.85))
    form = allocated(smaller).form
    held = sum(
        2 * layer_parameters(LARGE, x) + 4 * 1000 * 8 * 2 * (x.qk_head_dim + x.vo_head_dim)
        for x in form.layers
    )
    outside = 2 * (model_parameters(LARGE, form) - sum(layer_parameters(LARGE, x)
                                                       for x in form.layers))  # fmt: skip
    assert held + outside + 12345 <= smaller.fit
    with pytest.raises(PlanError, match="are too few") as caught:
        allocated(replace(target, fit=1000))
    nearest = caught.value.hint.split()[2]
    allocated(replace(target, fit=bytes_of(nearest)))


@pytest.mark.parametrize("servable", ["narrow_heads", "native"])
def test_a_stock_form_has_one_width_of_each_kind(servable):
    if servable == "native":
        form = MODEGPT.form(LARGE, START, Target(keep_fraction=0.8), options_of(servable="native"))
    else:
        form = allocated(Target(keep_fraction=0.8), servable=servable).form
    assert form.native
    (widths,) = set(widths_of(form))
    assert widths[1] == widths[2]
    assert (len(form.layers[0].pairs) * 2 == widths[1]) == (servable == "narrow_heads")


def test_a_form_for_vllm_has_heads_of_its_kernels_and_ffn_widths_by_layer():
    form = allocated(Target(keep_fraction=0.7), servable="vllm").form
    (heads,) = {(qk, vo) for _, qk, vo in widths_of(form)}
    assert heads[0] == heads[1]
    assert heads[0] in VLLM_HEAD_DIMS
    assert len({ffn for ffn, *_ in widths_of(form)}) > 1
    assert not form.native
    odd = replace(LARGE, head_dim=24)
    assert "none of them is left of 24" in MODEGPT.refuses(odd, options_of(servable="vllm"))


def test_auto_takes_a_stock_form_only_if_it_costs_little_more():
    target, options = Target(keep_fraction=0.8), options_of()
    even = MODEGPT.allocate(LARGE, START, target, options, findings(pairs=1.0, scale=(1, 1, 1)))
    assert even.servable in ("native", "narrow_heads")
    assert even.form.native
    apart = MODEGPT.allocate(LARGE, START, target, options, findings(scale=(0.01, 1, 9)))
    assert apart.servable == "remote"
    for found in (even, apart):
        stock = min(found.damages["native"], found.damages["narrow_heads"])
        assert (stock <= WORTH * found.damages["remote"]) == found.form.native


def test_steps_that_leave_no_narrower_heads_leave_out_that_form():
    wide = {"multiple_of": 512}  # of 8 KV heads: no multiple below 64 channels
    assert width_steps(LARGE, options_of(**wide))["qk"] == 64
    whole = [[64, 0.0]]
    coarse = {"mlp": curve(1536, 512, 0.3), "qk": whole, "vo": whole, "pairs": whole}
    known = [{"curves": coarse, "pair_scores": [1.0] * 32}] * 3
    target = Target(keep_fraction=0.8)
    found = MODEGPT.allocate(LARGE, START, target, options_of(**wide), known)
    assert found.damages.keys() == {"remote", "native"}
    narrow = options_of(servable="narrow_heads", **wide)
    with pytest.raises(PlanError, match="no head width below 64 is a multiple of 64"):
        MODEGPT.allocate(LARGE, START, target, narrow, known)


def test_the_predicted_damage_of_uncut_layers_is_nothing():
    curves = [finding["curves"] for finding in findings()]
    assert predicted(START.form, START.form, curves) == 0


def test_rope_pairs_are_ordered_by_their_share_over_all_layers():
    scores = [{"pair_scores": [0.1, 0.6, 0.3]}, {"pair_scores": [0.5, 0.3, 0.2]}, {}]
    assert pair_order(scores) == [1, 0, 2]
