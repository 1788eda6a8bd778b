"""A budget is met from below, exactly to one step, however it is shared out."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from planners.budget.budgets import parameters
from planners.budget.hull import by_measured_damage
from planners.budget.widths import (
    FIELD,
    by_influence,
    form_of,
    levels,
    uniform,
)
from planners.errors import NumericsError, PlanError
from planners.method import Target
from planners.model.cost import dense_parameters, dense_start, model_parameters
from tests.shapes import full_widths, has_bias, llama_shape, steps
from tests.strategies import shapes

MODULES = ("mlp", "qk", "vo")
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.15)


@st.composite
def problems(draw, *, convex=False, modules=None):
    """Draw a model, which modules take part, their step, and what was found out of each layer."""
    shape = draw(shapes())
    if modules is None:
        modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True))
    by = steps(draw(st.integers(1, 8)))
    damages = st.floats(0, 10, allow_subnormal=False)
    findings = []
    for _ in range(shape.num_layers):
        curves = {}
        for module in modules:
            full = full_widths(shape)[module]
            widths = levels(full, SHARES, step=by[module])
            costs = [draw(damages) for _ in widths]
            if convex:
                costs = convex_costs([full, *widths], sorted(costs))
            curves[module] = [[full, 0.0], *([w, c] for w, c in zip(widths, costs, strict=True))]
        findings.append({"influence": draw(st.floats(0, 2)), "curves": curves})
    return shape, tuple(modules), by, findings


def convex_costs(widths, slopes):
    """Return damages that grow with these slopes, ascending, from one width to the next."""
    costs, total = [], 0.0
    for before, after, slope in zip(widths, widths[1:], slopes, strict=False):
        total += slope * (before - after)
        costs.append(total)
    return costs


def allocated(problem, keep_fraction, *, how):
    shape, modules, by, findings = problem
    common = {"budget": parameters(shape, keep_fraction), "steps": by}
    if how == "uniform":
        return uniform(shape, modules=modules, **common)
    if how == "influence":
        return by_influence(shape, findings, modules=modules, temperature=0.2, **common)
    return by_measured_damage(shape, findings, **common)


def widths_of(shape, form):
    return [{m: getattr(layer, FIELD[m]) for m in full_widths(shape)} for layer in form.layers]


def count_of(shape, widths):
    return model_parameters(shape, form_of(shape, widths))


def smallest(problem, how):
    """Return the least parameters that an allocation can reach."""
    with pytest.raises(PlanError) as caught:
        allocated(problem, 1e-9, how=how)
    return float(caught.value.hint.split()[2])


def a_target(data, problem, how):
    least = smallest(problem, how)
    assume(least < 1)
    return data.draw(st.floats(least, 1.0))


HOW = ("uniform", "influence", "marginal")
BABY = llama_shape(
    family="llama", model_type="llama", num_layers=5, hidden=32, intermediate=350, num_heads=8,
    num_kv_heads=4, head_dim=4, vocab_size=105, tied=True,
)  # fmt: skip
BIASED = llama_shape(
    family="llama", model_type="llama", num_layers=3, hidden=24, intermediate=40, num_heads=4,
    num_kv_heads=4, head_dim=16, vocab_size=30, tied=True, qkv_bias=True, o_bias=True,
)  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@given(problem=problems(), data=st.data())
def test_the_budget_is_met_from_below_and_every_width_is_a_whole_step(how, problem, data):
    shape, modules, by, _ = problem
    keep_fraction = a_target(data, problem, how)
    form = allocated(problem, keep_fraction, how=how)
    assert model_parameters(shape, form) <= keep_fraction * dense_parameters(shape) + 1e-6
    full = full_widths(shape)
    for layer in widths_of(shape, form):
        for module, width in layer.items():
            step = by[module]
            assert 1 <= width <= full[module]
            assert width == full[module] or (module in modules and width % step == 0)


@pytest.mark.parametrize("how", HOW)
@given(problem=problems(), data=st.data())
def test_what_is_left_of_the_budget_is_less_than_one_step(how, problem, data):
    shape, modules, by, _ = problem
    keep_fraction = a_target(data, problem, how)
    found = widths_of(shape, allocated(problem, keep_fraction, how=how))
    room = keep_fraction * dense_parameters(shape) - count_of(shape, found)
    full, costs = full_widths(shape), []
    for index, layer in enumerate(found):
        for module in modules:
            if layer[module] < full[module]:
                step = by[module]
                wider = [dict(x) for x in found]
                wider[index][module] = min(full[module], (layer[module] // step + 1) * step)
                costs.append(count_of(shape, wider) - count_of(shape, found))
    assert costs == [] or room < max(costs)


@given(problem=problems(), data=st.data())
def test_layers_that_must_be_alike_are_and_no_larger_share_fits(problem, data):
    shape, modules, by, _ = problem
    keep_fraction = a_target(data, problem, "uniform")
    form = uniform(
        shape, budget=parameters(shape, keep_fraction), modules=modules, steps=by, alike=True
    )
    assert all(layer == form.layers[0] for layer in form.layers)
    full = full_widths(shape)
    count = model_parameters(shape, form)
    for numerator in range(1, 201):  # every share of a fine grid is either smaller or over
        cut = {}
        for module in modules:
            step = by[module]
            near = step * math.floor(numerator / 200 * full[module] / step + 0.5)
            cut[module] = min(full[module], max(step, near))
        if numerator == 200:
            cut = {module: full[module] for module in modules}
        other = count_of(shape, [full | cut] * shape.num_layers)
        assert other <= count or other > keep_fraction * dense_parameters(shape)


@pytest.mark.parametrize("how", HOW)
@given(problem=problems(), data=st.data())
def test_a_larger_budget_never_makes_a_smaller_model(how, problem, data):
    shape = problem[0]
    targets = sorted((a_target(data, problem, how), a_target(data, problem, how)))
    forms = [allocated(problem, target, how=how) for target in targets]
    small, large = (model_parameters(shape, form) for form in forms)
    assert small <= large
    for one, other in zip(*(widths_of(shape, form) for form in forms), strict=True):
        assert all(one[module] <= other[module] for module in one)


@pytest.mark.parametrize("how", HOW)
@given(problem=problems())
def test_an_impossible_target_names_the_nearest_that_is_possible(how, problem):
    hinted = smallest(problem, how)
    form = allocated(problem, hinted, how=how)
    kept = model_parameters(problem[0], form) / dense_parameters(problem[0])
    assert kept <= hinted <= kept + 1e-4 + 1e-12


@pytest.mark.parametrize("how", HOW)
@given(problem=problems())
def test_the_whole_budget_cuts_nothing(how, problem):
    shape = problem[0]
    found = widths_of(shape, allocated(problem, 1.0, how=how))
    assert found == [full_widths(shape)] * shape.num_layers


@given(problem=problems(), data=st.data())
def test_uniform_layers_differ_by_one_step_at_most(problem, data):
    shape, modules, by, _ = problem
    form = allocated(problem, a_target(data, problem, "uniform"), how="uniform")
    for module in modules:
        widths = [layer[module] for layer in widths_of(shape, form)]
        assert max(widths) - min(widths) <= by[module]


@given(problem=problems(), data=st.data())
def test_layers_that_matter_more_keep_more_by_influence(problem, data):
    shape, modules, _, findings = problem
    form = allocated(problem, a_target(data, problem, "influence"), how="influence")
    found = widths_of(shape, form)
    order = sorted(range(len(found)), key=lambda i: findings[i]["influence"])
    for less, more in pairwise(order):
        for module in modules:
            step = problem[2][module]
            assert found[less][module] <= found[more][module] + step


@given(problem=problems(), temperature=st.floats(1e-6, 1e-3), data=st.data())
def test_a_cold_softmax_still_meets_the_budget(problem, temperature, data):
    shape, modules, by, findings = problem
    keep_fraction = a_target(data, problem, "uniform")  # both can cut everything to one step
    form = by_influence(
        shape, findings, budget=parameters(shape, keep_fraction), modules=modules, steps=by,
        temperature=temperature,
    )  # fmt: skip
    room = keep_fraction * dense_parameters(shape) - model_parameters(shape, form)
    step = count_of(shape, [full_widths(shape)]) - count_of(shape, [{"mlp": 1, "qk": 2, "vo": 1}])
    assert room >= -1e-6
    assert room <= step


def damage_at(curve, width):
    """Return the damage on the straight line between two measured widths."""
    for (wide, cheap), (narrow, dear) in pairwise(curve):
        if narrow <= width <= wide:
            return cheap + (dear - cheap) * (wide - width) / (wide - narrow)
    return curve[0][1]


def summed_damage(problem, form):
    shape, modules, _, findings = problem
    return sum(
        damage_at(finding["curves"][module], layer[module])
        for finding, layer in zip(findings, widths_of(shape, form), strict=True)
        for module in modules
    )


@pytest.mark.parametrize("module", MODULES)
@given(data=st.data())
def test_marginal_never_does_more_damage_than_uniform_of_the_same_size(module, data):
    problem = data.draw(problems(convex=True, modules=(module,)))
    shape, _, by, _ = problem
    # With widths and grid in whole steps both use the budget up to the same parameter.
    assume(full_widths(shape)[module] % by[module] == 0)
    assume(
        not has_bias(shape, "v_proj") or module != "vo"
    )  # a first cut moves a bias, which is no step
    keep_fraction = a_target(data, problem, "marginal")
    even = allocated(problem, keep_fraction, how="uniform")
    count = model_parameters(shape, even)
    ours = allocated(problem, count / dense_parameters(shape), how="marginal")
    assert model_parameters(shape, ours) == count
    assert summed_damage(problem, ours) <= summed_damage(problem, even) * (1 + 1e-9) + 1e-9


@given(problem=problems(convex=True), data=st.data())
def test_marginal_is_within_one_step_of_the_least_damage(problem, data):
    shape, modules, by, _ = problem
    keep_fraction = a_target(data, problem, "marginal")
    even = allocated(problem, keep_fraction, how="uniform")
    ours = allocated(
        problem, model_parameters(shape, even) / dense_parameters(shape), how="marginal"
    )
    # The most that a step costs anywhere: where steps differ in size the last one may overshoot.
    dearest = max(
        (
            (dear - cheap) / (wide - narrow) * (by[module] + shape.hidden)
            for finding in problem[3]
            for module in modules
            for (wide, cheap), (narrow, dear) in pairwise(finding["curves"][module])
        ),
        default=0.0,
    )
    assert summed_damage(problem, ours) <= summed_damage(problem, even) + dearest + 1e-9


def test_what_no_step_divides_is_cut_as_far_as_is_needed():
    shape = BABY
    curves = {"mlp": [[350, 0.0], [48, 1.0]]}
    findings = [{"curves": curves}] * shape.num_layers
    for percent in range(60, 100):
        found = by_measured_damage(
            shape, findings, budget=parameters(shape, percent / 100), steps=steps(8)
        )
        room = percent / 100 * dense_parameters(shape) - model_parameters(shape, found)
        assert 0 <= room < 8 * 3 * shape.hidden


def test_a_value_head_that_gets_its_bias_back_stays_within_the_budget():
    problem = (BIASED, ("vo",), steps(8), [
        {"influence": 0.1 * i, "curves": {"vo": [[16, 0.0], [2, 0.1 * i]]}}
        for i in range(BIASED.num_layers)
    ])  # fmt: skip
    dense = dense_parameters(BIASED)
    for how in HOW:
        for count in range(int(0.97 * dense), dense, 7):
            form = allocated(problem, count / dense, how=how)
            assert model_parameters(BIASED, form) <= count


def test_an_influence_that_is_no_number_is_refused_with_its_layer():
    findings = [{"influence": 0.1}, {"influence": math.nan}]
    with pytest.raises(NumericsError, match="layer 1"):
        by_influence(
            BABY,
            findings,
            budget=parameters(BABY, 0.8),
            modules=("mlp",),
            steps=steps(8),
            temperature=0.2,
        )


def test_a_target_below_the_lowest_level_is_refused_before_anything_is_measured():
    spec = methods.spec("modegpt")
    options = resolve_options(spec, {"grid": "0.9,0.8", "allocation": "marginal"})
    with pytest.raises(PlanError, match="cannot be met") as caught:
        spec.form(BABY, dense_start(BABY), Target(keep_fraction=0.5), options)
    spec.form(
        BABY, dense_start(BABY), Target(keep_fraction=float(caught.value.hint.split()[2])), options
    )


@pytest.mark.parametrize("grid", ["", "a", "0.9,", "1.5", "0.5,0", "nan"])
def test_a_grid_that_is_none_is_refused(grid):
    spec = methods.spec("modegpt")
    assert "grid" in spec.refuses(BABY, resolve_options(spec, {"grid": grid}))
