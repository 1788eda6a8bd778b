"""Several methods in one curve: the hull picks, the budget is met, and who cannot is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from planners.budget import candidates
from planners.budget.budgets import parameters
from planners.budget.hull import Level, by_measured_damage, cheapest, lower_hull
from planners.budget.ranks import one_share, rank_ladder
from planners.budget.spend import Choice
from planners.budget.widths import width_ladder
from planners.errors import ConfigError, PlanError
from planners.method import Target
from planners.model.cost import dense_parameters, dense_start, layer_parameters, model_parameters
from planners.model.modules import LINEARS_OF, kept_of, of_modules
from tests.shapes import dense_dims, llama_shape, steps
from tests.strategies import shapes

MODULES = ("mlp", "qk", "vo")
SHARES = (0.9, 0.6, 0.3)
BOTH = ("units", "ranks")
SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=2, hidden=24, intermediate=40, num_heads=4,
    num_kv_heads=2, head_dim=8, vocab_size=30, tied=True,
)  # fmt: skip


def ladders_of(shape, *, ffn=8):
    layer = dense_start(shape).form.layers[0]
    full = {"mlp": shape.intermediate, "qk": shape.head_dim, "vo": shape.head_dim}
    units = {m: width_ladder(full[m], m, SHARES, step=steps(ffn)[m]) for m in MODULES}
    ranks = {m: rank_ladder(shape, layer, m, SHARES) for m in MODULES}
    return {
        "units": {m: ladder for m, ladder in units.items() if ladder.sizes},
        "ranks": {m: ladder for m, ladder in ranks.items() if ladder is not None},
    }


@st.composite
def problems(draw):
    """Draw a model, how two methods shrink it, and what each level of either was found to cost."""
    shape = draw(shapes(max_layers=3))
    ladders = [ladders_of(shape, ffn=draw(st.integers(1, 8)))] * shape.num_layers
    damages = st.floats(0, 10, allow_subnormal=False)
    curves = [
        {
            method: {
                module: [
                    (ladder.whole, 0.0),
                    *((size, draw(damages)) for size in ladder.levels),
                ]
                for module, ladder in modules.items()
            }
            for method, modules in of_layer.items()
        }
        for of_layer in ladders
    ]
    return shape, curves, ladders


def allocated(problem, keep_fraction):
    shape, curves, ladders = problem
    start = dense_start(shape)
    return cheapest(curves, ladders, budget=parameters(shape, keep_fraction, start), start=start)


def a_target(data, problem):
    with pytest.raises(PlanError) as caught:
        allocated(problem, 1e-9)
    least = float(caught.value.hint.split()[2])
    assume(least < 1)
    return data.draw(st.floats(least, 1.0))


def only(problem, method):
    """Return the same problem without the other method."""
    shape, curves, ladders = problem
    return shape, *([{method: layer[method]} for layer in each] for each in (curves, ladders))


@given(problem=problems(), data=st.data())
def test_the_budget_is_met_from_below_and_less_than_one_step_is_left(problem, data):
    shape, _, ladders = problem
    keep_fraction = a_target(data, problem)
    found = allocated(problem, keep_fraction)
    room = keep_fraction * dense_parameters(shape) - model_parameters(shape, found.form)
    assert room >= -1e-6
    steps = []
    start = dense_start(shape)
    for layer, made, form in zip(start.form.layers, found.makers, found.form.layers, strict=True):
        for module, method in made.items():
            ladder = ladders[0][method][module]
            (size,) = (
                s for s in ladder.sizes
                if of_modules(layer, ladder.cut(layer, s), [module])
                == of_modules(layer, form, [module])
            )  # fmt: skip
            after = ladder.cut(layer, size + ladder.sizes.step) if size < ladder.sizes[-1] else None
            wider = of_modules(form, after or layer, [module])
            steps.append(layer_parameters(shape, wider) - layer_parameters(shape, form))
    assert steps == [] or room < max(steps)


@given(problem=problems(), data=st.data())
def test_a_module_is_shrunk_by_its_maker_alone_and_as_that_shrinks_it(problem, data):
    shape, _, ladders = problem
    found = allocated(problem, a_target(data, problem))
    start = dense_start(shape)
    for layer, made, form in zip(start.form.layers, found.makers, found.form.layers, strict=True):
        assert of_modules(layer, form, made) == form  # what has no maker is whole
        for module, method in made.items():
            own = of_modules(layer, form, [module])
            assert own in [ladders[0][method][module].cut(layer, s)
                           for s in ladders[0][method][module].sizes]  # fmt: skip
            assert own.ranks.keys() <= set(LINEARS_OF[module])
            assert bool(own.ranks) == (method == "ranks")


@given(problem=problems(), data=st.data())
def test_a_method_that_costs_more_everywhere_changes_nothing(problem, data):
    shape, curves, ladders = problem
    dear = [
        {"units": layer["units"], "ranks": {
            module: [(size, 0.0 if size == curve[0][0] else 1e6) for size, _ in curve]
            for module, curve in layer["ranks"].items()
        }}
        for layer in curves
    ]  # fmt: skip
    keep_fraction = a_target(data, only(problem, "units"))
    # Below what the cheap one can reach there is nothing but the dear one.
    alone = allocated(only(problem, "units"), keep_fraction)
    both = allocated((shape, dear, ladders), keep_fraction)
    assert both == alone


@given(problem=problems(), data=st.data())
def test_one_method_in_the_hull_is_that_method_by_itself(problem, data):
    shape, curves, _ = problem
    ffn = data.draw(st.integers(1, 8))
    ladders = [ladders_of(shape, ffn=ffn)] * shape.num_layers
    levels = {m: ladder.levels for m, ladder in ladders[0]["units"].items()}
    damages = st.floats(0, 10, allow_subnormal=False)
    curves = [
        {m: [(ladders[0]["units"][m].whole, 0.0), *((s, data.draw(damages)) for s in sizes)]
         for m, sizes in levels.items()}
        for _ in range(shape.num_layers)
    ]  # fmt: skip
    problem = shape, [{"units": each} for each in curves], ladders
    problem = only((*problem[:2], ladders), "units")
    keep_fraction = a_target(data, problem)
    findings = [{"curves": {m: [list(p) for p in c] for m, c in each.items()}} for each in curves]
    expected = by_measured_damage(
        shape, findings, budget=parameters(shape, keep_fraction), steps=steps(ffn)
    )
    assert allocated(problem, keep_fraction).form == expected


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10), st.sampled_from(BOTH))))
def test_no_level_of_any_method_is_below_the_hull(points):
    ladder = width_ladder(8, "vo", (), step=1)
    levels = [Level(saved=0, damage=0.0, choice=None)] + [
        Level(saved=saved, damage=damage, choice=Choice(ladder=ladder, size=1, method=method))
        for saved, damage, method in points
    ]
    segments = lower_hull(levels)
    slopes = [slope for slope, _ in segments]
    assert all(a < b for a, b in pairwise(slopes))
    ends = [next(level for level in levels if level.choice is choice) for _, choice in segments]
    corners = [levels[0], *ends]
    for level in levels:
        for a, b in pairwise(corners):
            if a.saved <= level.saved <= b.saved:
                at = a.damage + (b.damage - a.damage) * (level.saved - a.saved) / (
                    b.saved - a.saved
                )
                assert level.damage >= at - 1e-9
    assert max(level.saved for level in levels) == corners[-1].saved


# By hand: one module of one layer, v and o, with two methods.

ONE = replace(SHAPE, num_layers=1)


def two_curves(units, ranks, *, grid=(0.75, 0.5, 0.25)):
    layer = dense_start(ONE).form.layers[0]
    ladders = {
        "units": {"vo": width_ladder(8, "vo", grid, step=1)},
        "ranks": {"vo": rank_ladder(ONE, layer, "vo", grid)},
    }
    assert ladders["units"]["vo"].levels == (6, 4, 2)
    costs = {"units": units, "ranks": ranks}
    curves = {
        method: {"vo": list(zip(ladders[method]["vo"].levels, costs[method], strict=True))}
        for method in costs
    }
    return ONE, [curves], [ladders]


def test_the_hull_goes_from_one_method_to_the_other_where_that_is_cheaper():
    # A width of v and o holds 2 * 24 + 4 * 24 = 144 parameters; at half of them ranks cost less.
    problem = two_curves(units=(0.05, 1.0, 2.0), ranks=(0.5, 0.2, 1.5))
    dense = dense_parameters(ONE)
    few = allocated(problem, (dense - 2 * 144) / dense)
    assert few.makers == ({"vo": "units"},)
    assert few.form.layers[0].vo_head_dim == 6
    many = allocated(problem, (dense - 4 * 144) / dense)
    assert many.makers == ({"vo": "ranks"},)
    assert many.form.layers[0].vo_head_dim == 8
    assert many.form.layers[0].ranks.keys() == {"v_proj", "o_proj"}


@pytest.mark.parametrize(("second", "maker"), [(0.21, "units"), (1.0, "ranks")])
def test_between_the_levels_of_two_methods_the_one_that_loses_less_there_is_taken(second, maker):
    # The budget ends at three widths less: units lose there what is half way from 0.05 to `second`,
    # ranks what is a third of the way from 0.4 to 0.15.
    problem = two_curves(units=(0.05, second, 9.0), ranks=(0.4, 0.15, 3.0))
    dense = dense_parameters(ONE)
    for count in range(dense - 3 * 144 - 20, dense - 3 * 144 + 20):
        found = allocated(problem, count / dense)
        assert found.makers == ({"vo": maker},)
        assert 0 <= count - model_parameters(ONE, found.form) < 144


# Ladders of ranks.


@given(shapes(max_layers=1), st.sampled_from(MODULES), st.floats(0.05, 0.99))
def test_every_rung_of_ranks_holds_more_than_the_one_below_and_all_keep_one_share(
    shape, module, share
):
    start = dense_start(shape)
    layer = start.form.layers[0]
    ladder = rank_ladder(shape, layer, module, (share,))
    if ladder is None:
        return
    sizes = [layer_parameters(shape, ladder.cut(layer, size)) for size in ladder.sizes]
    assert all(a < b for a, b in pairwise([*sizes, layer_parameters(shape, layer)]))
    assert all(level in ladder.sizes for level in ladder.levels)
    # One share for all linears is what the method does by itself.
    expected = {
        name: max(1, int(share * out * inner / (out + inner)))
        for name in LINEARS_OF[module]
        for out, inner in [dense_dims(shape, name)]
    }
    for name, (out, inner) in {n: dense_dims(shape, n) for n in LINEARS_OF[module]}.items():
        if expected[name] * (out + inner) >= out * inner:
            del expected[name]  # it would save nothing, and is left whole
    for level in ladder.levels:
        assert ladder.cut(layer, level).ranks == expected


def test_what_a_step_before_has_factored_is_no_module_to_factor_again():
    start = dense_start(SHAPE)
    form = one_share(
        SHAPE, budget=parameters(SHAPE, 0.95), names=("q_proj",), step=lambda _: 1, start=start
    )
    assert rank_ladder(SHAPE, form.layers[0], "qk", SHARES) is None
    assert rank_ladder(SHAPE, form.layers[0], "vo", SHARES) is not None
    assert kept_of(start.form.layers[0], form.layers[0], "qk").startswith("ranks q_proj ")


# Who may compete.


def options(**given):
    return resolve_options(methods.spec("modegpt"), given)


@pytest.mark.parametrize("alone", ["", "modegpt", " modegpt ,modegpt"])
def test_a_method_that_competes_with_itself_is_as_it_was(alone):
    assert options(candidates=alone) == options()
    assert not methods.chosen("modegpt", options(candidates=alone)).candidates


@pytest.mark.parametrize("both", ["svdllm", "modegpt,svdllm", "svdllm, modegpt,svdllm"])
def test_who_competes_is_one_list_however_it_is_written(both):
    assert options(candidates=both)["candidates"] == "modegpt,svdllm"
    spec = methods.chosen("modegpt", options(candidates=both))
    assert [each.spec.name for each in spec.candidates] == ["modegpt", "svdllm"]


def test_the_statistics_are_those_of_all_who_compete_for_the_modules_that_take_part():
    own = options(candidates="svdllm", modules="qk")
    found = methods.chosen("modegpt", own).statistics(SHAPE, own)
    assert {str(s) for s in found} == {
        "q_rope.pair_energy", "k_rope.pair_energy", "attn_in.gram", "resid_attn.probe8192"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given_options", "words"),
    [
        (
            {"candidates": "svdlm"},
            "options.candidates: unknown method 'svdlm'; did you mean svdllm?",
        ),
        ({"candidates": "slicegpt"}, "options.candidates: slicegpt rotates the residual stream"),
        ({"candidates": "svdllm", "allocation": "uniform"}, "unless damage is measured"),
        ({"candidates": "svdllm", "servable": "native"}, "unless damage is measured"),
    ],
)
def test_who_cannot_compete_is_refused_with_the_reason(given_options, words):
    with pytest.raises(ConfigError, match=r"options\.candidates") as caught:
        methods.chosen("modegpt", options(**given_options))
    assert words in str(caught.value)


def test_a_candidate_that_shrinks_none_of_the_modules_is_refused():
    own = options(modules="qk")
    idle = replace(methods.spec("svdllm"), name="idle", joins=lambda _: {})
    with pytest.raises(ConfigError, match="candidates: idle shrinks none of qk"):
        candidates.combined_spec(methods.spec("modegpt"), own, [idle])


def test_a_budget_below_all_levels_is_refused_before_anything_is_measured():
    own = options(candidates="svdllm", grid="0.9,0.8")
    spec = methods.chosen("modegpt", own)
    start = dense_start(SHAPE)
    with pytest.raises(PlanError, match="cannot be met") as caught:
        spec.form(SHAPE, start, Target(keep_fraction=0.3), own)
    hinted = float(caught.value.hint.split()[2])
    spec.form(SHAPE, start, Target(keep_fraction=hinted), own)


def test_levels_on_one_line_stay_in_order_however_their_slopes_round():
    shape = llama_shape(
        family="llama", model_type="llama", num_layers=1, hidden=1, intermediate=32, num_heads=1,
        num_kv_heads=1, head_dim=2, vocab_size=1, tied=False,
    )  # fmt: skip
    curve = [[32, 0.0], [29, 0.0], [24, 0.0], [19, 9.146889241731804], [14, 57.04575727932263],
             [10, 95.36485170939528], [5, 145.36485170939528]]  # fmt: skip
    findings = [{"curves": {"mlp": curve}}]
    budget = parameters(shape, 1e-9)
    with pytest.raises(PlanError, match="cannot be met"):
        by_measured_damage(shape, findings, budget=budget, steps=steps(1))
