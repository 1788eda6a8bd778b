"""Rounding to few bits, against a textbook GPTQ in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.numerics.packed import packed
from actors.numerics.rounding import (
    DAMP,
    at_nearest,
    factor_of,
    relative_errors,
    round_columns,
    round_to_nearest,
    search_scales,
)
from planners.model.scheme import FP8, MXFP4, NVFP4, WHOLE_ROW, Scheme

BF16 = torch.bfloat16
INTEGERS = (
    Scheme(bits=2, group=32),
    Scheme(bits=3, group=16, symmetric=False),
    Scheme(bits=4, group=WHOLE_ROW),
    Scheme(bits=8, group=32, symmetric=False),
)
FLOATS = (
    Scheme(bits=4, group=16, grid=NVFP4),
    Scheme(bits=4, group=32, grid=MXFP4),
    Scheme(bits=8, group=WHOLE_ROW, grid=FP8),
)
CLOSE_TO_TIE = 1e-3  # of a step of the grid, in float32
SEEDS = st.integers(0, 2**32)


def gram_of(seed, width, tokens):
    """Return the Gram matrix of inputs of which neighbours are alike, some more active."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    mixed = torch.cumsum(x, dim=1) / 2 + x  # neighbours are alike
    size = 0.3 + torch.rand(width, generator=generator, dtype=torch.float64)
    return (mixed * size).T @ (mixed * size)


def weight_of(seed, rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1))


def textbook(weight, gram, scales, scheme):
    """Return codes, loss, weights over scales as they were rounded, and the order of columns.

    GPTQ as its paper has it: by the inverse of the Gram matrix and the upper factor of that, column
    by column, here in order of activity and with the scales of static groups.
    """
    width = len(gram)
    damped = gram + DAMP * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    # Of equally active inputs the last comes first, as in the code under test.
    order = torch.argsort(gram.diagonal(), stable=True).flip(0)
    inverse = torch.linalg.inv(damped[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    w = weight.double()[:, order].clone()
    codes, scaled = torch.zeros_like(w), torch.zeros_like(w)
    half, loss = 2 ** (scheme.bits - 1), 0.0
    for i, column in enumerate(order.tolist()):
        group = 0 if scheme.group == WHOLE_ROW else column // scheme.group
        scale, zero = scales.scale[:, group].double(), scales.zero[:, group].double()
        scaled[:, i] = w[:, i] / scale + zero
        codes[:, i] = scaled[:, i].round().clamp(-half, half - 1)
        error = (w[:, i] - (codes[:, i] - zero) * scale) / upper[i, i]
        w[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
        loss += float(error.square().sum())
    return codes, loss, scaled, order


@pytest.mark.parametrize("scheme", INTEGERS, ids=str)
@pytest.mark.parametrize(("width", "tokens"), [(32, 500), (160, 400), (160, 20)])
def test_codes_are_those_of_gptq_by_the_inverse(scheme, width, tokens):
    gram, weight = gram_of(3, width, tokens), weight_of(3, 48, width)
    factor = factor_of(packed(gram), where="tap o_in")
    (found,) = round_columns([(weight, scheme)], factor, stored=BF16)
    codes, loss, scaled, order = textbook(weight, gram, found.scales, scheme)

    other = found.codes.double()[:, order] != codes
    # A row may differ from a weight on that lies between two codes.
    for row in torch.nonzero(other.any(dim=1)).flatten().tolist():
        first = int(torch.nonzero(other[row])[0])
        from_tie = (scaled[row, first] % 1 - 0.5).abs()
        assert from_tie < CLOSE_TO_TIE, f"row {row}, {first} columns are equal"
    assert other.any(dim=1).sum() <= 2

    damped = gram + DAMP * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    lost = found.values().double() - weight.double()
    close = 1e-2 if other.any() else 1e-5
    assert float(((lost @ damped) * lost).sum()) == pytest.approx(loss, rel=close)


@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS], ids=str)
def test_the_relative_error_is_that_of_the_outputs(scheme):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(300, 64, generator=generator, dtype=torch.float64)
    weight, gram = weight_of(5, 9, 64), inputs.T @ inputs
    (found,) = round_columns([(weight, scheme)], factor_of(gram, where="tap"), stored=BF16)
    wanted, outputs = inputs @ weight.double().T, inputs @ found.values().double().T
    error = float((outputs - wanted).square().sum() / wanted.square().sum())
    assert relative_errors(weight, found, packed(gram))[0] == pytest.approx(error, rel=1e-6)
    assert error < {2: 0.5, 3: 0.1, 4: 0.05, 8: 2e-3}[scheme.bits]


@pytest.mark.parametrize("schemes", [INTEGERS, *((each, each) for each in FLOATS)])
def test_matrices_are_rounded_side_by_side_as_each_by_itself(schemes):
    """Rows do not depend on each other: not those of one matrix, nor of several schemes."""
    width = 160  # more than a block, not a multiple of it
    factor = factor_of(gram_of(7, width, 300), where="tap attn_in")
    rows = [(weight_of(i, 5 + i, width), each) for i, each in enumerate(schemes)]
    together = round_columns(rows, factor, stored=BF16)
    for (weight, scheme), found in zip(rows, together, strict=True):
        (alone,) = round_columns([(weight, scheme)], factor, stored=BF16)
        assert torch.equal(found.codes, alone.codes), str(scheme)
        assert torch.equal(found.scales.scale, alone.scales.scale)
        if scheme.grid != NVFP4:  # whose scales have a common factor
            (part,) = round_columns([(weight[2:4], scheme)], factor, stored=BF16)
            assert torch.equal(part.codes, found.codes[2:4]), str(scheme)


@given(SEEDS, st.sampled_from(INTEGERS), st.integers(1, 3), st.integers(1, 90))
def test_no_column_is_further_from_its_plane_than_half_a_step(seed, scheme, groups, tokens):
    """What Babai's nearest plane promises, and rounding to nearest does not."""
    width = 32 * groups
    weight, factor = weight_of(seed, 4, width), factor_of(gram_of(seed, width, tokens), where="tap")
    (found,) = round_columns([(weight, scheme)], factor, stored=BF16)
    lost = (weight.double() - found.values().double())[:, factor.order] @ factor.lower
    per_group = width if scheme.group == WHOLE_ROW else scheme.group
    step = found.scales.scale.double().repeat_interleave(per_group, dim=1)[:, factor.order]
    half = 2 ** (scheme.bits - 1)
    inside = ((found.codes > -half) & (found.codes < half - 1))[:, factor.order]
    allowed = step / 2 * factor.lower.diagonal() * (1 + 1e-3)
    assert (lost.abs() <= allowed)[inside].all()


@given(SEEDS, st.sampled_from((*INTEGERS, *FLOATS)), st.integers(1, 200))
def test_outputs_change_less_than_by_rounding_to_nearest_on_the_same_scales(seed, scheme, tokens):
    """Of many rows together: of one row, the nearest values may happen to be better."""
    weight, gram = weight_of(seed, 64, 64), gram_of(seed, 64, tokens)
    (found,) = round_columns([(weight, scheme)], factor_of(gram, where="tap"), stored=BF16)
    by_gptq, by_nearest = relative_errors(weight, found, gram)
    assert by_gptq <= by_nearest


@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS], ids=str)
def test_where_no_input_was_active_weights_are_rounded_to_the_nearest(scheme):
    weight, gram = weight_of(11, 7, 64), torch.zeros(64, 64, dtype=torch.float64)
    (found,) = round_columns([(weight, scheme)], factor_of(gram, where="tap"), stored=BF16)
    nearest = round_to_nearest(weight, gram.diagonal(), scheme, stored=BF16)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.isfinite(found.values()).all()
    assert relative_errors(weight, found, gram) == (0.0, 0.0)


@pytest.mark.parametrize("scheme", INTEGERS, ids=str)
def test_inputs_that_were_never_active_have_no_part_in_the_others(scheme):
    gram, dead = gram_of(13, 64, 200), [0, 9, 33, 63]
    gram[dead] = 0
    gram[:, dead] = 0
    weight = weight_of(13, 20, 64)
    factor = factor_of(gram, where="tap")
    (found,) = round_columns([(weight, scheme)], factor, stored=BF16)
    codes, *_, order = textbook(weight, gram, found.scales, scheme)
    assert (found.codes.double()[:, order] != codes).any(dim=1).sum() <= 1
    nearest = at_nearest(weight, found.scales, scheme)
    assert torch.equal(found.codes[:, dead], nearest.codes[:, dead])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS], ids=str)
def test_scales_are_exact_as_they_are_stored(scheme, stored):
    weight = weight_of(17, 6, 64)
    weight[0] = 0
    weight[1] *= 1e-6
    weight[2] *= 1e3
    scales = search_scales(weight, torch.ones(64), scheme, stored=stored)
    assert (scales.scale > 0).all()
    kind = {NVFP4: torch.float8_e4m3fn, MXFP4: torch.float8_e8m0fnu}.get(scheme.grid, stored)
    whole = scales.scale * scales.common
    # A scale of NVFP4 was divided by the common one in float32.
    close = 1e-6 if scheme.grid == NVFP4 else 0.0
    assert torch.allclose(whole.to(kind).float(), whole, rtol=close, atol=0)
    assert (at_nearest(weight, scales, scheme).values()[0] == 0).all()


@pytest.mark.parametrize("scheme", INTEGERS, ids=str)
def test_no_other_scale_that_was_tried_loses_less(scheme):
    """Of each group ``sum_j h_j (w_j - q_j)^2`` is least: below that of the whole range, too."""
    weight, active = weight_of(19, 12, 64), torch.rand(64, generator=torch.manual_seed(1)) + 0.1
    found = round_to_nearest(weight, active, scheme, stored=BF16)
    groups = scheme.groups(64)
    lost = ((found.values() - weight).square() * active).reshape(12, groups, -1).sum(-1)
    parts = weight.reshape(12, groups, -1)
    if scheme.symmetric:
        whole = parts.abs().amax(-1) * 2 / (2**scheme.bits - 1)
    else:
        whole = (parts.amax(-1).clamp(min=0) - parts.amin(-1).clamp(max=0)) / (2**scheme.bits - 1)
    ratio = found.scales.scale / whole
    assert ((ratio > 0.42) & (ratio < 1.01)).all()
    if scheme.bits <= 3:  # the largest weights are not worth the coarser grid
        assert float(ratio.mean()) < 0.95
    scale = whole.to(BF16).float()[..., None]
    half = 2 ** (scheme.bits - 1)
    zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        zero = (-parts.amin(-1, keepdim=True).clamp(max=0) / scale).round() - half
        zero = zero.clamp(-half, half - 1)
    plain = ((parts / scale + zero).round().clamp(-half, half - 1) - zero) * scale
    unshrunk = ((plain - parts).square() * active.reshape(1, groups, -1)).sum(-1)
    assert (lost <= unshrunk * (1 + 1e-5)).all()
