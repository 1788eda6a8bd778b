"""Grams are sums: they do not care how the tokens were cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.numerics.gram import accumulate, add_blocks, product, rms_normed, symmetric
from actors.numerics.packed import unpacked, zeros
from planners.model.packing import ROWS

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def activations(seed, tokens, dim, dtype=torch.float32):
    """Return tokens whose channels differ in size a thousandfold, as in a real residual stream."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, dim)
    return (torch.randn(tokens, dim, generator=generator) * scale).to(dtype)


def summed(pieces, dim):
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for piece in pieces:
        accumulate(total, piece)
    return total


def relative_difference(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


SEEDS = st.integers(0, 2**32)
TOKENS = st.integers(1, 200)
DIMS = st.integers(1, 24)


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("dim", [24, 2 * ROWS, 3 * ROWS + 8])
def test_a_packed_gram_is_the_same_however_many_blocks_one_product_has(dim, at_once):
    x = activations(1, 50, dim)
    total = zeros(dim, device="cpu")
    for half in (x[:20], x[20:]):
        add_blocks(total, half, at_once=at_once)
    assert relative_difference(unpacked(total), x.double().T @ x.double()) < 1e-6


@given(SEEDS, TOKENS, DIMS, DTYPES)
def test_a_gram_is_the_sum_of_outer_products(seed, tokens, dim, dtype):
    x = activations(seed, tokens, dim, dtype)
    exact = x.double().T @ x.double()
    assert relative_difference(product(x), exact) < 1e-6


@given(SEEDS, TOKENS, TOKENS, DIMS)
def test_a_gram_is_additive(seed, one, other, dim):
    x = activations(seed, one + other, dim)
    both = summed([x], dim)
    assert relative_difference(summed([x[:one], x[one:]], dim), both) < 1e-6


@given(SEEDS, st.lists(st.integers(1, 50), min_size=1, max_size=8), DIMS)
def test_a_gram_does_not_depend_on_the_cut(seed, sizes, dim):
    x = activations(seed, sum(sizes), dim)
    whole, pieces = summed([x], dim), summed(x.split(sizes), dim)
    assert relative_difference(pieces, whole) < 1e-6


@given(SEEDS, TOKENS, DIMS)
def test_a_gram_made_symmetric_is_so_to_the_last_bit_and_positive_semi_definite(seed, tokens, dim):
    gram = symmetric(summed(activations(seed, tokens, dim).split(7), dim))
    assert torch.equal(gram, gram.T)
    smallest = torch.linalg.eigvalsh(gram)[0]
    assert smallest > -1e-6 * gram.trace()


@given(SEEDS, TOKENS, DIMS)
def test_half_precision_keeps_the_small_eigenvalues(seed, tokens, dim):
    x = activations(seed, tokens, dim, torch.bfloat16)
    exact = x.double().T @ x.double()
    assert product(x).dtype == torch.float32
    assert torch.allclose(product(x).diagonal().double(), exact.diagonal(), rtol=1e-5)


@given(SEEDS, TOKENS, DIMS, st.floats(1e-3, 1e3))
def test_a_normed_token_has_mean_square_one_whatever_its_size(seed, tokens, dim, size):
    normed = rms_normed(size * activations(seed, tokens, dim))
    assert torch.allclose(normed.square().mean(dim=-1), torch.ones(tokens), atol=1e-4)


def test_a_token_of_zeros_stays_one():
    assert torch.equal(rms_normed(torch.zeros(2, 5)), torch.zeros(2, 5))


@given(SEEDS, TOKENS, DIMS, DTYPES)
def test_no_function_changes_its_tokens(seed, tokens, dim, dtype):
    x = activations(seed, tokens, dim, dtype)
    before = x.clone()
    summed([x], dim)
    rms_normed(x)
    assert torch.equal(x, before)
