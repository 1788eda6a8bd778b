"""Ranks by truncation loss meet the budget to one rank, and follow the formula type by type."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from planners.budget.budgets import parameters
from planners.budget.ranks import CUT_ORDER, FLOOR, MOST_SHARE, by_type, filled
from planners.budget.ranks import uniform as uniform_ranks
from planners.budget.widths import uniform
from planners.errors import NumericsError, PlanError
from planners.method import Target
from planners.model.cost import dense_parameters, dense_start, linear_dims, model_parameters
from planners.model.form import Start
from planners.model.layer import ROLES
from tests.shapes import dense_dims, llama_shape, steps
from tests.strategies import shapes

SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=4, hidden=48, intermediate=96, num_heads=4,
    num_kv_heads=4, head_dim=12, vocab_size=60, tied=True,
)  # fmt: skip


@st.composite
def problems(draw):
    shape = draw(shapes())
    names = draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7, unique=True))
    losses = st.floats(0, 1e6, allow_subnormal=False)
    findings = [{"losses": {name: draw(losses) for name in names}} for _ in range(shape.num_layers)]
    return shape, names, findings


def allocated(problem, keep_fraction, *, start=None):
    shape, names, findings = problem
    start = start or dense_start(shape)
    return by_type(
        shape,
        findings,
        budget=parameters(shape, keep_fraction, start),
        names=names,
        step=lambda _: 1,
        start=start,
    )


def least(problem):
    with pytest.raises(PlanError) as caught:
        allocated(problem, 1e-9)
    return float(caught.value.hint.split()[2])


@given(problems(), st.data())
def test_less_than_one_rank_of_the_budget_is_left(problem, data):
    shape, names, _ = problem
    smallest = least(problem)
    assume(smallest < 1)
    keep_fraction = data.draw(st.floats(smallest, 1.0))
    form = allocated(problem, keep_fraction)
    room = keep_fraction * dense_parameters(shape) - model_parameters(shape, form)
    assert room >= -1e-6
    cut = [(n, layer) for layer in form.layers for n in layer.ranks]
    assert {n for n, _ in cut} <= set(names)
    assert not cut or room < max(sum(linear_dims(shape, layer, n)) for n, layer in cut)
    for name, layer in cut:
        out_dim, in_dim = linear_dims(shape, layer, name)
        assert layer.ranks[name] >= 1
        assert layer.ranks[name] * (out_dim + in_dim) < out_dim * in_dim


@given(problems(), st.data())
def test_a_matrix_that_loses_more_keeps_more_within_its_type(problem, data):
    _, names, findings = problem
    smallest = least(problem)
    assume(smallest < 1)
    form = allocated(problem, data.draw(st.floats(smallest, 1.0)))
    for name in names:
        ranks = [layer.ranks.get(name, math.inf) for layer in form.layers]
        order = sorted(range(len(ranks)), key=lambda i: findings[i]["losses"][name])
        for less, more in pairwise(order):
            assert ranks[less] <= ranks[more] + 1 or ranks[less] == math.inf


@given(problems(), st.data())
def test_no_matrix_keeps_less_than_half_of_what_its_type_keeps(problem, data):
    shape, names, _ = problem
    smallest = least(problem)
    assume(smallest < 1)
    form = allocated(problem, data.draw(st.floats(smallest, 1.0)))
    for name in names:
        out_dim, in_dim = linear_dims(shape, form.layers[0], name)
        whole = out_dim * in_dim / (out_dim + in_dim)  # the rank at which nothing is saved
        kept = [layer.ranks.get(name, whole) for layer in form.layers]
        mean = math.fsum(kept) / len(kept)
        # One rank that was cut off, and the one that the mean may have been raised by.
        assert all(rank >= FLOOR * mean - 1.5 for rank in kept)


def test_a_matrix_that_loses_nothing_is_not_cut_to_nothing():
    losses = [1e-9, 1e5, 1e5, 1e5]
    findings = [{"losses": dict.fromkeys(ROLES, loss)} for loss in losses]
    form = allocated((SHAPE, list(ROLES), findings), 0.5)
    first, *others = (layer.ranks["q_proj"] for layer in form.layers)
    share = (first + sum(others)) / 4
    assert FLOOR * share - 1 <= first < others[0]
    assert 0.5 * dense_parameters(SHAPE) - model_parameters(SHAPE, form) < 2 * SHAPE.intermediate


@given(problems(), st.data())
def test_equal_losses_are_one_share_for_all_but_for_the_last_rank(problem, data):
    shape, names, _ = problem
    same = [{"losses": dict.fromkeys(names, 3.0)}] * shape.num_layers
    smallest = least((shape, names, same))
    assume(smallest < 1)
    keep_fraction = data.draw(st.floats(smallest, 1.0))
    ours = allocated((shape, names, same), keep_fraction)
    even = uniform_ranks(
        shape,
        budget=parameters(shape, keep_fraction),
        names=names,
        step=lambda _: 1,
        start=dense_start(shape),
    )
    assert model_parameters(shape, even) <= model_parameters(shape, ours)
    for one, other in zip(ours.layers, even.layers, strict=True):
        for name in one.ranks:
            # At a share where ranks change, rounding says which of them is raised first.
            assert abs(one.ranks[name] - other.ranks[name]) <= 1


@given(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7, unique=True), st.data())
def test_linears_stay_whole_before_they_are_factored_to_no_use(names, data):
    start = dense_start(SHAPE)
    parts = sum(math.prod(dense_dims(SHAPE, name)) for name in names) * SHAPE.num_layers
    at_most = 1 - (1 - MOST_SHARE) * parts / dense_parameters(SHAPE)
    keep_fraction = data.draw(st.floats(at_most, 1.0))
    form = uniform_ranks(
        SHAPE, budget=parameters(SHAPE, keep_fraction), names=names, step=lambda _: 1, start=start
    )
    room = keep_fraction * dense_parameters(SHAPE) - model_parameters(SHAPE, form)
    assert room >= -1e-6
    factored = [(CUT_ORDER.index(n), -i) for i, x in enumerate(form.layers) for n in x.ranks]
    places = [(CUT_ORDER.index(n), -i) for i in range(SHAPE.num_layers) for n in names]
    # As few as the budget asks for, in the order.
    assert sorted(factored) == sorted(places)[: len(factored)]
    if factored:
        assert room < max(sum(linear_dims(SHAPE, x, n)) for x in form.layers for n in x.ranks)


@given(problems(), st.data())
def test_a_larger_budget_never_makes_a_factored_model_smaller(problem, data):
    shape, names, _ = problem
    smallest = least(problem)
    assume(smallest < 1)
    two = sorted(data.draw(st.floats(smallest, 1.0)) for _ in range(2))
    one, other = (
        model_parameters(
            shape,
            uniform_ranks(
                shape,
                budget=parameters(shape, f),
                names=names,
                step=lambda _: 1,
                start=dense_start(shape),
            ),
        )
        for f in two
    )
    assert one <= other


def test_at_99_percent_most_linears_are_whole_and_the_target_is_met_to_a_rank():
    form = uniform_ranks(
        SHAPE,
        budget=parameters(SHAPE, 0.99),
        names=ROLES,
        step=lambda _: 1,
        start=dense_start(SHAPE),
    )
    factored = [(index, n) for index, layer in enumerate(form.layers) for n in layer.ranks]
    room = 0.99 * dense_parameters(SHAPE) - model_parameters(SHAPE, form)
    assert 0 <= room < 2 * SHAPE.hidden
    assert factored == [(index, "q_proj") for index in range(4 - len(factored), 4)]
    assert len(factored) < 4


def test_what_is_removed_goes_as_one_over_the_logarithm_of_the_loss():
    losses = [10.0, 100.0, 1000.0, 1e5]
    findings = [{"losses": {"q_proj": loss}} for loss in losses]
    form = allocated((SHAPE, ["q_proj"], findings), 0.97)
    full = SHAPE.hidden * SHAPE.hidden / (2 * SHAPE.hidden)
    removed = [1 - layer.ranks["q_proj"] / full for layer in form.layers]
    products = [r * math.log1p(loss) for r, loss in zip(removed, losses, strict=True)]
    assert max(products) - min(products) <= 2 / full * math.log1p(losses[-1])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(0, 1), st.floats(0.01, 1))
def test_shares_are_in_proportion_until_they_are_the_most(weights, part, most):
    mean = part * most
    found = filled(weights, mean=mean, most=most)
    assert math.fsum(found) == pytest.approx(mean * len(weights), abs=1e-9)
    scale = [f / w for f, w in zip(found, weights, strict=True) if f < most - 1e-9]
    assert not scale or max(scale) == pytest.approx(min(scale), rel=1e-6, abs=1e-12)
    assert all(0 <= f <= most for f in found)


def test_ranks_of_a_step_build_on_the_widths_of_the_one_before():
    cut = uniform(SHAPE, budget=parameters(SHAPE, 0.9), modules=("mlp",), steps=steps(8))
    start = Start(form=cut, parameters_before=dense_parameters(SHAPE))
    findings = [{"losses": {"q_proj": 10.0 + i}} for i in range(4)]
    form = allocated((SHAPE, ["q_proj"], findings), 0.85, start=start)
    assert [layer.intermediate for layer in form.layers] == [
        layer.intermediate for layer in cut.layers
    ]
    room = 0.85 * dense_parameters(SHAPE) - model_parameters(SHAPE, form)
    assert 0 <= room < 2 * SHAPE.hidden


def test_a_loss_that_is_no_number_is_refused_with_its_layer_and_linear():
    findings = [{"losses": {"q_proj": 1.0}}, {"losses": {"q_proj": math.nan}}] * 2
    with pytest.raises(NumericsError, match="layer 1: the loss of q_proj"):
        allocated((SHAPE, ["q_proj"], findings), 0.9)


def test_losses_are_those_of_the_truncated_products_themselves():
    generator = torch.Generator().manual_seed(3)
    rand = {"generator": generator, "dtype": torch.float64}
    options = resolve_options(methods.spec("svdllm"), {"allocation": "by_type"})
    taps = {"attn_in": 48, "o_in": 48, "mlp_in": 48, "mlp_hidden": 96}
    x = {
        tap: torch.randn(200, dim, **rand) @ torch.randn(dim, dim, **rand)
        for tap, dim in taps.items()
    }
    weights = {f"{n}.weight": torch.randn(dense_dims(SHAPE, n), **rand) for n in ROLES}
    sums = {f"{tap}.gram": each.T @ each for tap, each in x.items()}
    spec = methods.spec("svdllm")
    form = spec.form(SHAPE, dense_start(SHAPE), Target(keep_fraction=0.6), options).layers[0]
    found = methods.load("svdllm").losses(weights, sums, form=form, options=options)
    of = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attn_in") | {
        "o_proj": "o_in", "gate_proj": "mlp_in", "up_proj": "mlp_in", "down_proj": "mlp_hidden",
    }  # fmt: skip
    for name, tap in of.items():
        # No matrix of this rank comes nearer to the outputs than their own truncated SVD.
        spectrum = torch.linalg.svdvals(x[tap] @ weights[f"{name}.weight"].T)
        expected = float(spectrum[form.ranks[name] :].norm())
        assert found[name] == pytest.approx(expected, rel=1e-8)
