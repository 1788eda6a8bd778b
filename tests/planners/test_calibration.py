"""Too few calibration tokens are named beside the width of the Gram matrix that needs more."""

import pytest

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from planners.budget.budgets import parameters
from planners.budget.widths import uniform
from planners.calibration import few_tokens
from planners.model.taps import Statistic
from tests.shapes import llama_shape, steps

SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=2, hidden=64, intermediate=160, num_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=60, tied=True,
)  # fmt: skip
TAPS = frozenset({Statistic("attn_in", "gram"), Statistic("mlp_hidden", "gram")})


def said(tokens, statistics=TAPS, **given):
    return few_tokens(SHAPE, statistics, tokens=tokens, sequence_length=8, **given)


def test_as_many_tokens_as_the_widest_gram_are_enough():
    assert said(160) == ""
    assert "152 calibration tokens" in said(152)
    assert "mlp_hidden 160:" in said(152)
    assert "--calibration-sequences 20 " in said(152)  # of 8 tokens each
    assert "attn_in 64, mlp_hidden 160:" in said(56)


def test_what_is_no_matrix_asks_for_no_tokens():
    kinds = ("pair_energy", "cosine", "probe128")
    assert said(1, {Statistic("q_rope", kind) for kind in kinds}) == ""


def test_what_is_no_matrix_hides_no_matrix_at_its_tap():
    for kinds in (("gram", "probe128"), ("probe128", "gram")):
        assert "attn_in 64:" in said(63, [Statistic("attn_in", kind) for kind in kinds])


def test_a_gram_of_each_head_is_as_wide_as_a_head():
    assert said(16, {Statistic("v", "head_gram")}) == ""
    assert "v 16:" in said(15, {Statistic("v", "head_gram")})


def test_the_widths_are_those_that_a_step_before_has_left():
    cut = uniform(SHAPE, budget=parameters(SHAPE, 0.7), modules=("mlp",), steps=steps(8))
    left = cut.layers[0].intermediate
    assert said(left, start=cut) == ""
    assert f"mlp_hidden {left}:" in said(left - 1, start=cut)


@pytest.mark.parametrize("method", methods.available())
def test_every_method_is_warned_of_one_token(method):
    spec = methods.spec(method)
    assert said(1, spec.statistics(SHAPE, resolve_options(spec, {})))
