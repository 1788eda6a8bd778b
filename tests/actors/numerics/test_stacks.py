"""Factors that neighbouring layers share, against explicit matrices in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.numerics.low_rank import low_rank
from actors.numerics.packed import packed
from actors.numerics.stacks import (
    EXACT,
    coefficients,
    core,
    cp,
    relative_error,
    scales,
    shared_basis,
    tucker,
    whitened,
)
from planners.errors import NumericsError

WHERE = "layers 2-3, q_proj"
SIZES = {
    "seed": st.integers(0, 2**32),
    "layers": st.integers(1, 4),
    "out": st.integers(2, 14),
    "inner": st.integers(2, 14),
}
RANKS = st.tuples(st.integers(1, 14), st.integers(1, 14))
ROUNDED = (torch.float64, torch.float32, torch.bfloat16)


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gram_of(seed, inner, *, tokens=60):
    """Return the Gram matrix of inputs of which neighbours are alike."""
    inputs = torch.cumsum(normal(seed + 1, tokens, inner), dim=1) / 2 + normal(
        seed + 2, tokens, inner
    )
    return inputs.T @ inputs


def weights_of(seed, layers, out, inner):
    """Return weights of layers that are somewhat alike."""
    return list(normal(seed + 3, layers, out, inner) + normal(seed + 4, out, inner))


def stack_of(seed, layers, out, inner):
    weights, gram = weights_of(seed, layers, out, inner), gram_of(seed, inner)
    return weights, gram, whitened(weights, gram, where=WHERE)


def error_of(weights, approximations, gram):
    """Return the relative error of all layers, each under the same Gram matrix."""
    lost = sum(
        ((w - a) @ gram * (w - a)).sum() for w, a in zip(weights, approximations, strict=True)
    )
    return float((lost / sum((w @ gram * w).sum() for w in weights)).sqrt())


def of_basis(found):
    return [second @ found.first for second in found.seconds]


def of_tucker(found):
    return [found.second @ each @ found.first for each in found.cores]


def of_cp(found):
    return [(found.second * each) @ found.first for each in found.scales]


def tail(matrix, rank):
    """Return the energy after the first singular values, as a share."""
    energy = torch.linalg.svdvals(matrix).square()
    return float(energy[rank:].sum() / energy.sum())


# Recovery


@given(**SIZES, ranks=RANKS)
def test_a_stack_that_shares_a_basis_is_found_again(seed, layers, out, inner, ranks):
    rank = min(ranks[0], inner)
    first, gram = normal(seed, rank, inner), gram_of(seed, inner)
    weights = [second @ first for second in normal(seed + 9, layers, out, rank)]
    found = shared_basis(whitened(weights, gram, where=WHERE), rank=rank, where=WHERE)
    assert error_of(weights, of_basis(found), gram) < EXACT
    assert found.error < EXACT


@given(**SIZES, ranks=RANKS)
def test_a_stack_between_shared_bases_is_found_again(seed, layers, out, inner, ranks):
    rank_in, rank_out = min(ranks[0], inner), min(ranks[1], out)
    first, second = normal(seed, rank_in, inner), normal(seed + 7, out, rank_out)
    weights = [second @ each @ first for each in normal(seed + 9, layers, rank_out, rank_in)]
    gram = gram_of(seed, inner)
    stack = whitened(weights, gram, where=WHERE)
    found = tucker(stack, rank_in=rank_in, rank_out=rank_out, where=WHERE)
    assert error_of(weights, of_tucker(found), gram) < EXACT
    assert found.errors[-1] < EXACT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("layers", "out", "inner", "rank"),
    [(2, 12, 9, 4), (2, 30, 40, 25), (4, 30, 40, 25), (3, 9, 9, 9)],
)
def test_a_stack_of_shared_components_is_found_again(seed, layers, out, inner, rank):
    first, second = normal(seed, rank, inner), normal(seed + 7, out, rank)
    weights = [(second * each) @ first for each in normal(seed + 9, layers, rank)]
    gram = gram_of(seed, inner)
    found = cp(whitened(weights, gram, where=WHERE), rank=rank, where=WHERE)
    assert error_of(weights, of_cp(found), gram) < EXACT
    assert found.errors[-1] < EXACT


@given(**SIZES)
def test_at_full_rank_nothing_is_lost(seed, layers, out, inner):
    weights, gram, stack = stack_of(seed, layers, out, inner)
    for approximations in (
        of_basis(shared_basis(stack, rank=inner, where=WHERE)),
        of_tucker(tucker(stack, rank_in=inner, rank_out=out, where=WHERE)),
        of_cp(cp(stack, rank=layers * inner, where=WHERE)),
    ):
        assert error_of(weights, approximations, gram) < EXACT


# Optimality


@given(**SIZES, ranks=RANKS)
def test_the_error_of_a_basis_is_the_tail_of_the_spectrum(seed, layers, out, inner, ranks):
    weights, gram, stack = stack_of(seed, layers, out, inner)
    found = shared_basis(stack, rank=ranks[0], where=WHERE)
    wanted = tail(torch.cat(weights) @ torch.linalg.cholesky(gram), ranks[0])
    assert found.error**2 == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert error_of(weights, of_basis(found), gram) == pytest.approx(found.error, abs=EXACT)


@given(**SIZES, ranks=RANKS)
def test_what_one_layer_shares_with_itself_is_its_best_low_rank_matrix(
    seed, layers, out, inner, ranks
):
    del layers
    weights, gram, stack = stack_of(seed, 1, out, inner)
    rank = min(*ranks, out, inner)
    first, second, error, _ = low_rank(weights[0], gram, rank=rank, where=WHERE)
    size = float(weights[0].abs().max())
    for (approximation,) in (
        of_basis(shared_basis(stack, rank=rank, where=WHERE)),
        of_tucker(tucker(stack, rank_in=rank, rank_out=rank, where=WHERE)),
        of_cp(cp(stack, rank=rank, where=WHERE)),
    ):
        assert error_of(weights, [approximation], gram) == pytest.approx(error, abs=EXACT)
        if error**2 > 1e-3:
            assert torch.allclose(approximation, second @ first, atol=1e-4 * size)


@given(**SIZES, ranks=RANKS)
def test_tucker_lies_between_the_spectra_of_its_modes_and_their_sum(
    seed, layers, out, inner, ranks
):
    """Each mode alone loses its tail at least; the HOSVD loses the sum of the tails at most."""
    weights, gram, stack = stack_of(seed, layers, out, inner)
    found = tucker(stack, rank_in=ranks[0], rank_out=ranks[1], where=WHERE)
    tails = (
        tail(torch.cat(list(stack.weights)), ranks[0]),
        tail(torch.cat(list(stack.weights.mT)), ranks[1]),
    )
    for error in found.errors:
        assert max(tails) - 1e-9 <= error**2 <= sum(tails) + 1e-9
    assert error_of(weights, of_tucker(found), gram) == pytest.approx(found.errors[-1], abs=EXACT)


@given(**SIZES, ranks=RANKS)
def test_sharing_never_beats_as_many_ranks_in_each_layer_alone(seed, layers, out, inner, ranks):
    rank = min(*ranks, out, inner)
    _, _, stack = stack_of(seed, layers, out, inner)
    energy = stack.weights.square().sum(dim=(1, 2))
    alone = sum(
        tail(each, rank) * float(e / energy.sum())
        for each, e in zip(stack.weights, energy, strict=True)
    )
    between = tucker(stack, rank_in=rank, rank_out=rank, where=WHERE).errors[-1]
    assert shared_basis(stack, rank=rank, where=WHERE).error ** 2 >= alone - 1e-9
    assert between**2 >= alone - 1e-9
    # Components are cores that are diagonal: no better than any core.
    assert cp(stack, rank=rank, where=WHERE).errors[-1] ** 2 >= alone - 1e-9


@given(**SIZES, ranks=RANKS)
def test_no_sweep_raises_an_error(seed, layers, out, inner, ranks):
    weights, gram, stack = stack_of(seed, layers, out, inner)
    components = cp(stack, rank=min(ranks[0], layers * inner), where=WHERE)
    between = tucker(stack, rank_in=ranks[0], rank_out=ranks[1], where=WHERE)
    for errors in (components.errors, between.errors):
        for before, after in pairwise(errors):
            assert after <= before + EXACT
    error = error_of(weights, of_cp(components), gram)
    assert error == pytest.approx(components.errors[-1], abs=EXACT)


@given(**SIZES, ranks=RANKS)
def test_components_are_no_worse_than_singular_triples_of_the_layers_combinations(
    seed, layers, out, inner, ranks
):
    _, _, stack = stack_of(seed, layers, out, inner)
    flat = stack.weights.flatten(1)
    turned = torch.linalg.svd(flat, full_matrices=False)[0].T @ flat
    values = torch.linalg.svdvals(turned.view(-1, out, inner)).flatten().square()
    values = values.sort(descending=True).values
    rank = min(ranks[0], layers * inner)
    found = cp(stack, rank=rank, where=WHERE)
    assert found.errors[0] ** 2 <= float(values[rank:].sum() / values.sum()) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_components_that_cancel_stay_small(seed):
    """Two components come as close as they like to this stack of rank 3, by ever larger scales."""
    cores = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]]).double()
    mixed = torch.einsum("kl,lij->kij", normal(seed, 2, 2), cores)
    weights = list(normal(seed + 10, 5, 2) @ mixed @ normal(seed + 20, 2, 6))
    stack = whitened(weights, torch.eye(6, dtype=torch.float64), where=WHERE)
    found = cp(stack, rank=2, where=WHERE)
    assert found.scales.abs().max() < 10 * stack.energy**0.5
    assert found.errors[-1] < 0.1


@given(**SIZES, ranks=RANKS)
def test_shared_factors_are_normalised(seed, layers, out, inner, ranks):
    _, gram, stack = stack_of(seed, layers, out, inner)
    found = tucker(stack, rank_in=min(ranks[0], inner), rank_out=min(ranks[1], out), where=WHERE)
    for inner_products in (found.second.T @ found.second, found.first @ gram @ found.first.T):
        identity = torch.eye(len(inner_products), dtype=torch.float64)
        assert torch.allclose(inner_products, identity, atol=1e-5)
    components = cp(stack, rank=1, where=WHERE)
    assert float(components.second.square().sum()) == pytest.approx(1)
    assert float((components.first @ gram @ components.first.T)[0, 0]) == pytest.approx(1, rel=1e-5)


# A layer's own part


def own_case(seed, out, inner, rank, dtype):
    weight, gram = normal(seed + 5, out, inner), gram_of(seed, inner)
    factor = torch.linalg.cholesky(gram)
    first, second = (normal(seed + 6, rank, inner).to(dtype), normal(seed + 8, out, rank).to(dtype))
    return weight, gram, factor, first, second


@pytest.mark.parametrize("dtype", ROUNDED)
@given(seed=SIZES["seed"], out=SIZES["out"], inner=SIZES["inner"])
def test_own_coefficients_are_least_squares(dtype, seed, out, inner):
    weight, gram, factor, first, _ = own_case(seed, out, inner, max(1, inner // 2), dtype)
    found = coefficients(weight, first, gram, where=WHERE)
    wanted = torch.linalg.lstsq((first.double() @ factor).T, (weight @ factor).T).solution.T
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", ROUNDED)
@given(seed=SIZES["seed"], out=SIZES["out"], inner=SIZES["inner"])
def test_an_own_core_is_least_squares(dtype, seed, out, inner):
    rank = max(1, min(out, inner) // 2)
    weight, gram, factor, first, second = own_case(seed, out, inner, rank, dtype)
    found = core(weight, first, second, gram, where=WHERE)
    # vec(S X F L) = kron(S, (F L)^T) vec(X), row by row.
    matrix = torch.kron(second.double(), (first.double() @ factor).T.contiguous())
    wanted = torch.linalg.lstsq(matrix, (weight @ factor).reshape(-1, 1)).solution
    wanted = wanted.view(rank, rank)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", ROUNDED)
@given(seed=SIZES["seed"], out=SIZES["out"], inner=SIZES["inner"])
def test_own_scales_are_least_squares(dtype, seed, out, inner):
    rank = max(1, min(out, inner))
    weight, gram, factor, first, second = own_case(seed, out, inner, rank, dtype)
    found = scales(weight, first, second, gram, where=WHERE)
    columns = second.double().T[:, :, None] * (first.double() @ factor)[:, None, :]
    matrix = columns.flatten(1).T  # (out * inner, rank)
    wanted = torch.linalg.lstsq(matrix, (weight @ factor).reshape(-1, 1)).solution[:, 0]
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("layer", range(2))
def test_an_own_part_is_better_on_the_layers_own_inputs(layer):
    weights = weights_of(3, 2, 10, 12)
    grams = [gram_of(5, 12), gram_of(50, 12)]
    weight, gram = weights[layer], grams[layer]
    stack = whitened(weights, grams[0] + grams[1], where=WHERE)
    basis = shared_basis(stack, rank=4, where=WHERE)
    own = coefficients(weight, basis.first, gram, where=WHERE) @ basis.first
    assert relative_error(weight, own, gram) < relative_error(weight, of_basis(basis)[layer], gram)
    between = tucker(stack, rank_in=6, rank_out=5, where=WHERE)
    own = core(weight, between.first, between.second, gram, where=WHERE)
    own = between.second @ own @ between.first
    assert relative_error(weight, own, gram) < relative_error(
        weight, of_tucker(between)[layer], gram
    )
    parts = cp(stack, rank=7, where=WHERE)
    own = scales(weight, parts.first, parts.second, gram, where=WHERE)
    own = (parts.second * own) @ parts.first
    assert relative_error(weight, own, gram) < relative_error(weight, of_cp(parts)[layer], gram)


def test_the_relative_error_is_that_of_the_outputs():
    inputs, weight, other = normal(1, 50, 8), normal(2, 5, 8), normal(3, 5, 8)
    wanted = torch.linalg.norm(inputs @ (weight - other).T) / torch.linalg.norm(inputs @ weight.T)
    gram = inputs.T @ inputs
    assert relative_error(weight, other, packed(gram)) == pytest.approx(float(wanted))
    assert relative_error(weight, weight, gram) == 0


# What does not matter, and what is refused


def everything(weights, gram):
    """Return the approximations by each form, and by the own parts of the first layer."""
    stack = whitened(weights, gram, where=WHERE)
    basis = shared_basis(stack, rank=3, where=WHERE)
    between = tucker(stack, rank_in=4, rank_out=3, where=WHERE)
    parts = cp(stack, rank=5, where=WHERE)
    weight = weights[0]
    return [
        *of_basis(basis),
        *of_tucker(between),
        *of_cp(parts),
        coefficients(weight, basis.first, gram, where=WHERE) @ basis.first,
        between.second @ core(weight, between.first, between.second, gram, where=WHERE),
        scales(weight, parts.first, parts.second, gram, where=WHERE)[:, None] * parts.first,
    ]


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**30])
def test_the_scale_of_the_gram_does_not_matter(scale):
    weights, gram = weights_of(1, 2, 9, 8), gram_of(1, 8)
    plain, scaled = everything(weights, gram), everything(weights, scale * gram)
    for one, other in zip(plain[:7], scaled[:7], strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)


def test_results_are_the_same_each_time_and_from_a_packed_gram():
    weights, gram = weights_of(1, 2, 9, 8), gram_of(1, 8)
    before = [weight.clone() for weight in weights], gram.clone()
    once, again = everything(weights, gram), everything(weights, gram)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(weights, before[0], strict=True))
    assert torch.equal(gram, before[1])
    from_packed = everything(weights, packed(gram))
    assert all(torch.allclose(one, other) for one, other in zip(once, from_packed, strict=True))


def test_half_precision_is_decomposed_in_double():
    weights = [weight.bfloat16() for weight in weights_of(1, 2, 9, 8)]
    gram = gram_of(1, 8)
    exact = everything([weight.double() for weight in weights], gram)
    found = everything(weights, gram)
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("tokens", [0, 3])
def test_inputs_that_were_never_active_leave_finite_factors(tokens):
    weights, gram = weights_of(1, 2, 9, 8), gram_of(1, 8, tokens=tokens)
    assert all(torch.isfinite(each).all() for each in everything(weights, gram))


def test_layers_without_weights_leave_zeros():
    weights = [torch.zeros(9, 8), torch.zeros(9, 8)]
    assert all(not each[:9].any() for each in everything(weights, gram_of(1, 8))[:7])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_place(bad):
    weights, gram = weights_of(1, 2, 9, 8), gram_of(1, 8)
    first, second = normal(2, 3, 8), normal(3, 9, 3)
    for broken in (weights[1], gram, first, second):
        good = float(broken[0, 1])
        broken[0, 1] = bad
        if broken is weights[1] or broken is gram:
            with pytest.raises(NumericsError, match="layers 2-3, q_proj"):
                whitened(weights, gram, where=WHERE)
        if broken is not second:
            with pytest.raises(NumericsError, match="layers 2-3, q_proj"):
                coefficients(weights[1], first, gram, where=WHERE)
        for fit in (core, scales):
            with pytest.raises(NumericsError, match="layers 2-3, q_proj"):
                fit(weights[1], first, second, gram, where=WHERE)
        broken[0, 1] = good
