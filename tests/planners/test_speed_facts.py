"""Facts of a form that explain its speed."""

from dataclasses import replace

from planners.model.cost import dense_model_form, model_parameters
from planners.model.speed_facts import speed_facts
from tests.shapes import llama_shape

SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=3, hidden=256, intermediate=512,
    num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=1000, tied=False,
)  # fmt: skip


def test_a_dense_model_of_even_widths_has_nothing_that_slows_it():
    form = dense_model_form(SHAPE)
    facts = speed_facts(SHAPE, form)
    assert facts["uneven"] == []
    assert facts["low_rank"] == facts["shortcuts"] == 0
    assert facts["heads"] == [[64, 64]] * 3
    assert facts["parameters"] == model_parameters(SHAPE, form)
    assert facts["parameters"] - facts["layer_parameters"] == 2 * 1000 * 256 + 256


def test_widths_that_are_no_multiples_of_8_are_listed_with_their_layers():
    dense = dense_model_form(SHAPE)
    cut = replace(
        dense.layers[0], intermediate=501, qk_head_dim=50, ranks={"q_proj": 60, "o_proj": 64}
    )
    sliced = replace(dense.layers[0], shortcuts=True, residual_mid=250, qk_head_dim=50)
    facts = speed_facts(SHAPE, replace(dense, layers=(cut, dense.layers[1], sliced)))
    assert {(row["what"], row["width"]): row["layers"] for row in facts["uneven"]} == {
        ("FFN", 501): [0],
        ("q/k head", 50): [0, 2],
        ("rank", 60): [0],
        ("residual", 250): [2],
    }
    assert (facts["low_rank"], facts["shortcuts"], facts["changed"]) == (2, 1, 0)
