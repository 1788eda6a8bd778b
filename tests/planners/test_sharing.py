"""Which layers share, how large what they share is, and that it is counted once."""

from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planners.budget.budgets import budget_of
from planners.budget.sharing import (
    alternating,
    basis_sizes,
    cp_sizes,
    groups_of,
    sequential,
    shared_within,
    tucker_sizes,
)
from planners.canonical_json import to_json
from planners.families import load as load_family
from planners.method import Target
from planners.model.cost import (
    dense_model_form,
    dense_start,
    forward_flops,
    held_parameters,
    layer_parameters,
    linear_dims,
    model_parameters,
)
from planners.model.form import SOURCE, Link, factor_owners, model_form_from_json
from planners.model.layer import ROLES
from planners.model.modules import kept_of, of_modules
from tests.shapes import llama_shape

SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=7, hidden=24, intermediate=40, num_heads=4,
    num_kv_heads=2, head_dim=6, vocab_size=11, tied=False,
)  # fmt: skip


def changed(layer=4, source=2, *, rank=3, fitted=True, names=("q_proj", "down_proj")):
    """Return the form in which linears of one layer are changes of another's."""
    form = dense_model_form(SHAPE)
    layers = list(form.layers)
    links = dict.fromkeys(names, Link(layer=source, parts=(SOURCE,), fitted=fitted))
    ranks = dict.fromkeys(names, rank) if rank else {}
    layers[layer] = replace(layers[layer], ranks=ranks, links=links)
    return replace(form, layers=tuple(layers), native=False)


def test_the_layouts_of_the_paper_leave_two_layers_at_each_end():
    assert alternating(10) == {2: 1, 4: 3, 6: 5}
    assert sequential(8) == {2: 1, 3: 1, 4: 1, 5: 1}
    assert alternating(4) == sequential(4) == {}


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_change_stores_its_factors_and_number_and_multiplies_by_the_source_too(rank, fitted):
    dense, form = dense_model_form(SHAPE), changed(rank=rank, fitted=fitted)
    saved = 0
    for name in ("q_proj", "down_proj"):
        out_dim, in_dim = linear_dims(SHAPE, dense.layers[4], name)
        saved += out_dim * in_dim - rank * (out_dim + in_dim) - fitted
    assert model_parameters(SHAPE, dense) - model_parameters(SHAPE, form) == saved
    taken = held_parameters(SHAPE, form.layers[4]) - layer_parameters(SHAPE, form.layers[4])
    assert taken == 24 * 24 + 24 * 40
    more = forward_flops(SHAPE, tokens=1, sequence_length=1, form=form)
    more -= forward_flops(SHAPE, tokens=1, sequence_length=1)
    assert more == 2 * (rank * (24 + 24 + 24 + 40) + 2 * fitted)


def test_a_form_that_shares_survives_json_and_modules_are_taken_over_whole():
    form = changed()
    assert model_form_from_json(to_json(form)) == form
    start = dense_model_form(SHAPE).layers[4]
    mlp = of_modules(start, form.layers[4], ["mlp"])
    assert (set(mlp.links), set(mlp.ranks)) == ({"down_proj"}, {"down_proj"})
    assert of_modules(mlp, form.layers[4], ["mlp", "qk"]) == form.layers[4]
    assert kept_of(start, form.layers[4], "mlp") == "ranks down_proj 3 beside layer 2"


def test_a_tensor_that_is_taken_has_the_name_of_the_layer_that_stores_it():
    form = changed()
    layers = list(form.layers)
    layers[3] = replace(layers[3], ranks={"o_proj": 2}, cores={"o_proj": 0})
    link = Link(layer=3, parts=("first", "second"))
    layers[5] = replace(layers[3], links={"o_proj": link})
    form = replace(form, layers=tuple(layers))
    layer = "model.layers.{}.self_attn.{}.weight".format
    assert load_family("llama").shared_tensors(form) == {
        layer(4, "q_proj.source"): layer(2, "q_proj"),
        "model.layers.4.mlp.down_proj.source.weight": "model.layers.2.mlp.down_proj.weight",
        layer(5, "o_proj.first"): layer(3, "o_proj.first"),
        layer(5, "o_proj.second"): layer(3, "o_proj.second"),
    }
    assert factor_owners(form) == {(5, 3)}  # a source is not waited for


SIZED = {"basis": basis_sizes, "tucker": tucker_sizes, "cp": cp_sizes}
dims = st.tuples(st.integers(2, 60), st.integers(2, 60))


@pytest.mark.parametrize("form", SIZED)
@given(dims=dims, layers=st.integers(1, 4), share=st.floats(0.01, 1.0))
def test_shared_factors_store_at_most_the_share_and_fewer_than_all(form, dims, layers, share):
    sizes = SIZED[form](dims, layers, share)
    whole = layers * dims[0] * dims[1]
    if sizes is None:
        return  # not even one
    out_dim, in_dim = dims
    rows = sizes.core or sizes.first
    first, second = sizes.first * in_dim, rows * out_dim
    core = {None: 0, 0: sizes.first}.get(sizes.core, rows * sizes.first)
    times_second = 1 if "second" in sizes.parts else layers
    stored = first + times_second * second + layers * core
    assert stored < whole
    smallest = (sizes.first, sizes.core or 0)
    assert stored <= share * whole or 1 in smallest


@pytest.mark.parametrize("form", SIZED)
@given(dims=dims, layers=st.integers(1, 4), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_share_never_has_smaller_factors(form, dims, layers, shares):
    small, large = (SIZED[form](dims, layers, share) for share in sorted(shares))
    if small is not None and large is not None:
        assert small.first <= large.first
        assert (small.core or 0) <= (large.core or 0)


@pytest.mark.parametrize("form", SIZED)
@given(share=st.floats(0.05, 0.99), group=st.integers(1, 4), by=st.sampled_from([1, 8, 16, 256]))
def test_no_factor_is_wider_than_its_matrix_and_none_is_stored_that_saves_nothing(
    form, share, group, by
):
    dense = dense_start(SHAPE)
    budget = budget_of(SHAPE, dense, Target(keep_fraction=1.0))
    sized = dict.fromkeys(ROLES, lambda dims, layers, _: SIZED[form](dims, layers, share))
    with patch("planners.budget.sharing.largest_share", lambda at, _: at(share)):
        found = shared_within(SHAPE, dense, sized, alone=(), group=group, budget=budget,
                              step=lambda _: by)  # fmt: skip
    assert model_parameters(SHAPE, found) <= model_parameters(SHAPE, dense.form)
    for layer in found.layers:
        for name in layer.ranks:
            out_dim, in_dim = linear_dims(SHAPE, layer, name)
            if layer.cores.get(name) != 0:
                assert layer.ranks[name] <= in_dim
            if layer.cores.get(name):
                assert layer.cores[name] <= out_dim


def test_layers_of_one_kind_are_grouped_in_order():
    assert groups_of(SHAPE, 3) == [(0, 1, 2), (3, 4, 5), (6,)]
    kinds = replace(SHAPE, kinds=SHAPE.kinds * 2, own_kinds=(0, 0, 0, 1, 0, 0, 0))
    assert groups_of(kinds, 2) == [(0, 1), (2,), (3,), (4, 5), (6,)]
