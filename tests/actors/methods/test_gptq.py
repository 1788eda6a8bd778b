"""What GPTQ promises of a layer: its bytes, its errors, and that nothing else of it changes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import methods
from actors.numerics.rounding import DAMP, round_to_nearest
from actors.storage.quantised import decoded
from planners.errors import NumericsError
from planners.method import Target
from planners.model.cost import dense_start, layer_bytes, linear_dims, matrices
from planners.model.form import dense_form
from planners.model.layer import ROLES
from planners.model.scheme import WHOLE_ROW, Scheme
from planners.model.taps import INPUT_OF
from tests.actors.methods.test_every_method import (
    DTYPES,
    case_of,
    cases,
    options_of,
    relative,
    run,
)
from tests.shapes import llama_shape

GPTQ = methods.load("gptq")
SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=1, hidden=12, intermediate=16, num_heads=4,
    num_kv_heads=2, head_dim=4, vocab_size=11, tied=False,
)  # fmt: skip
some = settings(max_examples=8)


def formed(shape, **options):
    """Return the form of a layer of which whole rows share a scale: any width will do."""
    chosen = options_of("gptq", group="0", **options)
    form = methods.spec("gptq").form(shape, dense_start(shape), Target(), chosen)
    return form.layers[0], chosen


@some
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_a_layer_has_the_bytes_that_the_planners_count(data, dtype, bits, symmetric):
    case = data.draw(cases(dtype=dtype))
    inputs = {**case.weights, **case.sums}
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    form, options = formed(case.shape, bits=str(bits), symmetric=str(symmetric).lower())
    new, _ = GPTQ.compress(case.weights, case.sums, shape=case.shape, form=form, options=options)
    written = sum(tensor.nbytes for tensor in new.values())
    assert written == layer_bytes(case.shape, form, width=dtype.itemsize)
    assert [key for key in before if not torch.equal(before[key], inputs[key])] == []
    kept = set(new) & set(case.weights)
    assert kept == {name for name in case.weights if name.removesuffix(".weight") not in ROLES}
    assert all(torch.equal(new[name], case.weights[name]) for name in kept)


@some
@given(case=cases(), bits=st.integers(2, 8))
def test_the_errors_of_a_linear_are_those_on_its_tokens(case, bits):
    form, options = formed(case.shape, bits=str(bits))
    new, said = GPTQ.compress(case.weights, case.sums, shape=case.shape, form=form, options=options)
    rounded = decoded(new, form.schemes)
    for name in ROLES:
        x = case.taps[INPUT_OF[name]]
        old, weight = (each[f"{name}.weight"].double() for each in (case.weights, rounded))
        assert said["errors"][name] == pytest.approx(relative(x @ weight.T, x @ old.T) ** 2)
    assert said["errors"].keys() == said["nearest"].keys() == set(ROLES)
    assert {*said["rungs"].values()} == {"cholesky"}


@some
@given(case=cases())
def test_eight_bits_hardly_change_a_layer(case):
    form, options = formed(case.shape, bits="8")
    new, _ = GPTQ.compress(case.weights, case.sums, shape=case.shape, form=form, options=options)
    weights = {name: tensor.double() for name, tensor in decoded(new, form.schemes).items()}
    out = run(case.shape, replace(form, schemes={}), weights, case.hidden)
    expected = case.taps["resid_out"].reshape(out.shape)
    assert relative(out, expected) < 0.03


@some
@given(case=cases(), bits=st.integers(2, 8))
def test_rounding_to_the_nearest_is_an_option(case, bits):
    form, options = formed(case.shape, bits=str(bits), rounding="nearest")
    new, said = GPTQ.compress(case.weights, case.sums, shape=case.shape, form=form, options=options)
    found = decoded(new, form.schemes)
    for name in ROLES:
        active = case.sums[f"{INPUT_OF[name]}.gram"].diagonal()
        weight = case.weights[f"{name}.weight"]
        plain = round_to_nearest(weight, active, form.schemes[name], stored=torch.bfloat16)
        assert torch.equal(found[f"{name}.weight"], plain.values())
    assert said["errors"] == said["nearest"]
    assert {*said["rungs"].values()} == {"nearest"}


@some
@given(case=cases(), bits=st.integers(3, 8))
def test_both_factors_of_a_linear_are_rounded_each_on_its_own_inputs(case, bits):
    form = replace(dense_form(case.shape), ranks={"o_proj": 4})
    options = options_of("svdllm")
    cut, _ = methods.load("svdllm").compress(
        case.weights, case.sums, shape=case.shape, form=form, options=options
    )
    both = {f"o_proj.{part}": Scheme(bits=bits, group=WHOLE_ROW) for part in ("first", "second")}
    form = replace(form, schemes=both)
    new, said = GPTQ.compress(
        cut, case.sums, shape=case.shape, form=form, options=options_of("gptq")
    )
    found = {name: tensor.double() for name, tensor in decoded(new, both).items()}
    inputs = case.taps["o_in"]
    middle = inputs @ cut["o_proj.first.weight"].double().T
    for part, x in (("first", inputs), ("second", middle)):
        old = cut[f"o_proj.{part}.weight"].double()
        error = relative(x @ found[f"o_proj.{part}.weight"].T, x @ old.T) ** 2
        assert said["errors"][f"o_proj.{part}"] == pytest.approx(error)
    assert (
        matrices(case.shape, form)["o_proj.second"][0] == linear_dims(case.shape, form, "o_proj")[0]
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gram_matrix_that_is_not_finite_is_refused_with_the_linears(broken):
    case = case_of(SHAPE, 0, 20)
    form, options = formed(case.shape)
    bad = case.sums["mlp_in.gram"].clone()
    bad[0, 0] = broken
    with pytest.raises(NumericsError, match=r"gate_proj, up_proj.*NaN or infinite"):
        GPTQ.compress(
            case.weights, {**case.sums, "mlp_in.gram": bad}, shape=case.shape, form=form,
            options=options,
        )  # fmt: skip


def test_a_matrix_that_is_not_positive_is_damped_and_that_is_said():
    case = case_of(SHAPE, 0, 20)
    form, options = formed(case.shape)
    gram = case.sums["o_in.gram"].clone()
    lowest, mean, more = torch.linalg.eigvalsh(gram)[0], gram.diagonal().mean(), DAMP + 5e-5
    gram.diagonal().sub_((lowest + more * mean) / (1 + more))  # then it lacks ``more`` of the mean
    sums = {**case.sums, "o_in.gram": gram}
    _, said = GPTQ.compress(case.weights, sums, shape=case.shape, form=form, options=options)
    assert said["rungs"]["o_proj"].startswith("cholesky damped")
    assert said["rungs"]["q_proj"] == "cholesky"
    gram.diagonal().sub_(gram.diagonal().mean())
    with pytest.raises(NumericsError, match=r"o_proj: .* is not positive semi-definite"):
        GPTQ.compress(case.weights, sums, shape=case.shape, form=form, options=options)
