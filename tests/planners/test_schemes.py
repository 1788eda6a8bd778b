"""Bits and groups beside widths: what schemes can be named, what they cost, and one hull of all."""

import random
import re
from dataclasses import replace
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import methods
from orchestrator.recipe.config import bytes_of
from orchestrator.recipe.method_options import resolve_options
from planners.budget.joint import table_schemes
from planners.budget.schemes import fitted, resolved_schemes, schemes_of
from planners.canonical_json import to_json
from planners.errors import ConfigError, PlanError
from planners.method import Target
from planners.model.cost import (
    dense_start,
    layer_bytes,
    layer_parameters,
    linear_bits,
    matrices,
    model_bytes,
    model_parameters,
)
from planners.model.form import model_form_from_json
from planners.model.scheme import (
    WHOLE_ROW,
    Scheme,
    dividing_group,
    nominal_bits,
    stored_bits,
)
from tests.shapes import llama_shape

SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=2, hidden=64, intermediate=96, num_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=120, tied=True, dtype="bfloat16",
)  # fmt: skip
START = dense_start(SHAPE)
few = settings(max_examples=6)


def options_of(name, **given):
    own = resolve_options(methods.spec(name), given)
    return resolved_schemes(own, budgets_bits=True)


OPTIONS = {(name, tie): options_of(name, tie=tie)
           for name in ("modegpt", "gptq") for tie in ("fused", "free")}  # fmt: skip
LADDERS = {
    name: methods.spec(name).ladders(SHAPE, START.form.layers[0], OPTIONS[name, "fused"])
    for name in ("modegpt", "gptq")
}


def problem_of(name, tie, seed):
    """Return a method, options, and findings of each layer: any damage of any level."""
    drawn = random.Random(seed)
    findings = []
    for index in range(SHAPE.num_layers):
        curves = {
            each: [[ladder.whole, 0.0]] * (ladder.scheme is None)
            + [[size, drawn.random()] for size in ladder.levels]
            for each, ladder in LADDERS[name].items()
        }
        table = "head" if index else "embedding"
        findings.append({"curves": curves, "tables": {table: {"8": 0.01, "4": drawn.random()}}})
    return name, OPTIONS[name, tie], findings


def problems(*names):
    return st.builds(
        problem_of,
        st.sampled_from(names or ("modegpt", "gptq")),
        st.sampled_from(("fused", "free")),
        st.integers(0, 2**32),
    )


def allocated(problem, target):
    name, options, findings = problem
    return methods.spec(name).allocate(SHAPE, START, target, options, findings)


def refused(problem, target):
    """Return message and hint with which a budget is refused: before measuring, and after it."""
    name, options, _ = problem
    with pytest.raises(PlanError) as at_start:
        methods.spec(name).form(SHAPE, START, target, options)
    with pytest.raises(PlanError) as caught:
        allocated(problem, target)
    assert str(caught.value) == str(at_start.value)
    return str(caught.value), caught.value.hint


def nearest_bytes(problem):
    message, hint = refused(problem, Target(keep_bytes=1))
    assert "keep_bytes: 1 bytes are too few: the smallest result of these options" in message
    return bytes_of(re.match(r"use --keep-bytes (\w+) or more", hint)[1])


@given(problem=problems(), more=st.floats(0, 1.2))
@few
def test_a_result_has_at_most_the_bytes_that_were_asked_for(problem, more):
    least, whole = nearest_bytes(problem), model_bytes(SHAPE, START.form)
    budget = int(least + more * (whole - least))
    assert model_bytes(SHAPE, allocated(problem, Target(keep_bytes=budget)).form) <= budget
    provisional = methods.spec(problem[0]).form(SHAPE, START, Target(keep_bytes=budget), problem[1])
    assert model_bytes(SHAPE, provisional) <= budget


@given(problem=problems(), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@few
def test_a_larger_budget_never_has_more_predicted_damage(problem, shares):
    least, whole = nearest_bytes(problem), model_bytes(SHAPE, START.form)
    small, large = (int(least + share * (whole - least)) for share in sorted(shares))
    of_small, of_large = (allocated(problem, Target(keep_bytes=b)).damage for b in (small, large))
    assert of_large <= of_small + 1e-12


@given(problem=problems(), share=st.floats(0, 1))
@few
def test_a_tied_attention_has_one_scheme(problem, share):
    name, options, findings = problem
    least, whole = nearest_bytes(problem), model_bytes(SHAPE, START.form)
    target = Target(keep_bytes=int(least + share * (whole - least)))
    form = allocated((name, {**options, "tie": "fused"}, findings), target).form
    for layer in form.layers:
        q, k, v, o = (layer.schemes.get(f"{role}_proj") for role in "qkvo")
        assert q == k == v
        assert (o is None) == (q is None)
        assert o is None or (o.bits, o.symmetric) == (q.bits, q.symmetric)
        assert layer.schemes.get("gate_proj") == layer.schemes.get("up_proj")


@given(problem=problems())
@few
def test_the_nearest_possible_bits_are_named_and_pass(problem):
    message, hint = refused(problem, Target(bits=0.5))
    assert "bits: 0.5 a weight are too few" in message
    named = float(re.match(r"use --bits ([0-9.]+) or more", hint)[1])
    form = allocated(problem, Target(bits=named)).form
    weights = sum(rows * width for layer in START.form.layers
                  for rows, width in matrices(SHAPE, layer).values())  # fmt: skip
    reached = sum(linear_bits(SHAPE, layer, width=2) for layer in form.layers) / weights
    assert named - 0.01 <= reached <= named
    with pytest.raises(PlanError):
        allocated(problem, Target(bits=reached - 0.01))


@given(problem=problems("modegpt"))
@few
def test_groups_divide_the_rows_of_every_width_that_is_chosen(problem):
    least = nearest_bytes(problem)
    for layer in allocated(problem, Target(keep_bytes=least + 2000)).form.layers:
        dims = matrices(SHAPE, layer)
        for name, scheme in layer.schemes.items():
            assert scheme.group == WHOLE_ROW or dims[name][1] % scheme.group == 0


def test_the_default_floor_of_three_bits_is_left_only_where_two_are_named():
    for name in ("modegpt", "gptq"):
        bits = {scheme.bits for scheme in schemes_of(options_of(name))}
        assert min(bits) == 3
        named = options_of(name, schemes="2/32, 4/row")
        assert schemes_of(named) == (
            Scheme(bits=2, group=32),
            Scheme(bits=4, group=WHOLE_ROW),
        )


@pytest.mark.parametrize("text", ["1/32", "9/32", "4", "4/", "4/0", "4/x", "4:32", "4/32z", "4/-1"])
def test_a_scheme_that_cannot_be_read_is_refused_with_one_that_can(text):
    with pytest.raises(ConfigError, match=r"no scheme; it must be BITS/GROUP, .* such as 4/128"):
        schemes_of(options_of("gptq", schemes=f"4/32,{text}"))


def test_nothing_is_quantised_unless_bytes_or_bits_are_budgeted():
    own = resolve_options(methods.spec("modegpt"), {})
    assert {"schemes", "tie"}.isdisjoint(resolved_schemes(own, budgets_bits=False))
    none = resolve_options(methods.spec("modegpt"), {"schemes": "none"})
    assert {"schemes", "tie"}.isdisjoint(resolved_schemes(none, budgets_bits=True))


@given(st.integers(0, 9), st.integers(1, 4096))
def test_a_dividing_group_is_the_largest_power_of_two_that_divides(power, width):
    found = dividing_group(2**power, width)
    assert found == gcd(2**power, width)
    asked = Scheme(bits=4, group=2**power)
    taken = fitted(asked, width)
    assert taken.group == (found if found >= 16 else WHOLE_ROW)
    assert taken.groups(width) * (width if taken.group == WHOLE_ROW else taken.group) == width


@given(st.integers(2, 8), st.sampled_from((16, 32, WHOLE_ROW)), st.booleans(),
       st.integers(1, 40), st.integers(1, 6))  # fmt: skip
def test_stored_bits_are_the_nominal_ones_but_for_words_and_the_shape(
    bits, group, symmetric, rows, words
):
    scheme = Scheme(bits=bits, group=group, symmetric=symmetric)
    width = 32 * words
    filling = stored_bits(scheme, rows, width) - nominal_bits(scheme, rows, width)
    assert filling >= 128
    assert filling == 128 or not symmetric
    assert filling < 128 + 32 * scheme.groups(width)


def test_a_form_with_schemes_is_read_back_and_costs_less():
    layer = START.form.layers[0]
    schemes = {name: Scheme(bits=4, group=32, symmetric=False) for name in matrices(SHAPE, layer)}
    form = replace(
        START.form,
        layers=(replace(layer, schemes=schemes), START.form.layers[1]),
        tables={"head": table_schemes(SHAPE)["8"]},
        dtype="float16",
        tied=False,
    )
    assert model_form_from_json(to_json(form)) == form
    assert form.is_quantised
    assert layer_bytes(SHAPE, form.layers[0], width=2) < layer_parameters(SHAPE, layer)
    whole = model_bytes(SHAPE, replace(START.form, dtype="float32"))
    assert whole == 4 * model_parameters(SHAPE, START.form)


def test_low_rank_factors_are_matrices_of_their_own():
    layer = replace(START.form.layers[0], ranks={"q_proj": 16})
    dims = matrices(SHAPE, layer)
    assert dims["q_proj.first"] == (16, 64)
    assert dims["q_proj.second"] == (64, 16)
    assert "q_proj" not in dims
    scheme = Scheme(bits=3, group=16)
    both = replace(layer, schemes={"q_proj.first": scheme, "q_proj.second": scheme})
    saved = layer_bytes(SHAPE, layer, width=2) - layer_bytes(SHAPE, both, width=2)
    assert saved == sum(2 * a * b - stored_bits(scheme, a, b) // 8 for a, b in ((16, 64), (64, 16)))
