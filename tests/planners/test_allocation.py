"""The largest result that is not above the target."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors import methods
from orchestrator.config import resolve_options
from planners.allocation import largest_width
from planners.cost import dense_parameters, model_parameters
from planners.errors import PlanError
from planners.plan import ModelShape, Target

SPEC = methods.spec("slicegpt")
SHAPE = ModelShape(
    family="llama", model_type="llama", num_layers=4, hidden=96, intermediate=256, num_heads=6,
    num_kv_heads=2, head_dim=16, vocab_size=300, tied=False,
)  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {
        "rotation": st.sampled_from(("per_site", "shared")),
        "round_to": st.integers(1, 16),
        "slice_head": st.booleans(),
    }
)


def step_of(options):
    """Return what the kept width is a multiple of; a stock model needs whole heads as well."""
    return math.lcm(options["round_to"], SHAPE.num_heads if options["rotation"] == "shared" else 1)


def sliced(width, options):
    """Return the form of one width and its share of the parameters."""
    form = SPEC.form(SHAPE, Target(slice=1 - width / SHAPE.hidden), options)
    assert form.embedding_dim == width
    return form, model_parameters(SHAPE, form) / dense_parameters(SHAPE)


def budgets(options):
    """Draw a target that can be met."""
    return st.floats(sliced(step_of(options), options)[1], 1.0)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_the_width_is_the_largest_that_is_not_above_the_target(increments, keep_fraction):
    counts = [sum(increments[: i + 1]) for i in range(len(increments))]
    before = max(1, counts[-1])
    fitting = [i for i, count in enumerate(counts) if count <= keep_fraction * before]
    assume(fitting)
    found = largest_width(
        range(len(counts)), counts.__getitem__, before=before, keep_fraction=keep_fraction
    )
    assert found == fitting[-1]


@given(OPTIONS, st.data())
def test_slicegpt_keeps_the_largest_width_within_a_true_budget(options, data):
    options = resolve_options(SPEC, options)
    keep_fraction = data.draw(budgets(options))
    form = SPEC.form(SHAPE, Target(keep_fraction=keep_fraction), options)
    kept = model_parameters(SHAPE, form) / dense_parameters(SHAPE)
    assert kept <= keep_fraction
    if form.embedding_dim < SHAPE.hidden:
        assert form.embedding_dim % step_of(options) == 0
        wider = min(form.embedding_dim + step_of(options), SHAPE.hidden)
        assert sliced(wider, options)[1] > keep_fraction


@given(OPTIONS, st.data())
def test_a_larger_budget_never_gives_a_smaller_result(options, data):
    options = resolve_options(SPEC, options)
    fractions = sorted(data.draw(st.tuples(budgets(options), budgets(options))))
    forms = [SPEC.form(SHAPE, Target(keep_fraction=f), options) for f in fractions]
    assert forms[0].embedding_dim <= forms[1].embedding_dim


@given(OPTIONS)
def test_an_impossible_target_names_the_nearest_that_is_possible(options):
    options = resolve_options(SPEC, options)
    with pytest.raises(PlanError) as caught:
        SPEC.form(SHAPE, Target(keep_fraction=0.001), options)
    hinted = float(caught.value.hint.split()[2])
    form = SPEC.form(SHAPE, Target(keep_fraction=hinted), options)
    smallest = model_parameters(SHAPE, form) / dense_parameters(SHAPE)
    assert f"{smallest:.4f}" in str(caught.value)
    assert smallest <= hinted <= smallest + 1e-4


def test_a_slice_that_leaves_nothing_names_the_smallest_width():
    options = resolve_options(SPEC, {"round_to": 64})
    with pytest.raises(PlanError) as caught:
        SPEC.form(SHAPE, Target(slice=0.5), options)
    hinted = float(caught.value.hint.split()[-1])
    assert SPEC.form(SHAPE, Target(slice=hinted), options).embedding_dim == 64


@given(st.integers(1, 5000), st.integers(0, 99))
def test_a_slice_rounds_as_people_count(hidden, percent):
    kept = hidden * (100 - percent) // 100
    assume(kept >= 1)
    shape = ModelShape(
        family="llama", model_type="llama", num_layers=1, hidden=hidden, intermediate=8,
        num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=8, tied=False,
    )  # fmt: skip
    options = resolve_options(SPEC, {"round_to": 1})
    assert SPEC.form(shape, Target(slice=percent / 100), options).embedding_dim == kept
