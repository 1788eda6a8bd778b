"""A packed symmetric matrix is the same matrix, whatever is done with it."""

import pytest
import torch

from actors.numerics import linalg
from actors.numerics.gram import accumulate
from actors.numerics.linalg import (
    cholesky_psd,
    eigh_descending,
    inverse_diagonal,
    lower_transposed_times,
    solve_lower_transposed,
)
from actors.numerics.nystrom import nystrom
from actors.numerics.packed import (
    all_finite,
    congruence,
    diagonal,
    packed,
    permuted,
    unpacked,
    zeros,
)
from planners.errors import NumericsError

DIMS = (7, 256, 300, 600)  # within a block, one block, a block and a bit, several


def gram(dim, seed=0):
    x = torch.randn(dim + 50, dim, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x


@pytest.mark.parametrize("dim", DIMS)
def test_packing_and_unpacking_gives_the_matrix(dim):
    matrix = gram(dim)
    matrix = (matrix + matrix.T) / 2
    assert torch.equal(unpacked(packed(matrix)), matrix)
    assert torch.equal(diagonal(packed(matrix)), matrix.diagonal())


@pytest.mark.parametrize("dim", DIMS)
def test_what_is_unpacked_is_symmetric_to_the_last_bit(dim):
    crooked = gram(dim) + torch.rand(dim, dim).double()
    whole = unpacked(packed(crooked))
    assert torch.equal(whole, whole.T)


def test_a_packed_sum_is_that_of_whole_products():
    total, whole = zeros(300, device="cpu"), torch.zeros(300, 300, dtype=torch.float64)
    for x in torch.randn(3, 90, 300, generator=torch.Generator().manual_seed(1)):
        accumulate(total, x)
        accumulate(whole, x)
    assert float((unpacked(total) - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_half_precision_is_summed_as_it_is_in_single():
    x = torch.randn(90, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    halves, singles = zeros(300, device="cpu"), zeros(300, device="cpu")
    accumulate(halves, x)
    accumulate(singles, x.float())
    assert torch.equal(halves, singles)


def test_stored_in_single_precision_each_entry_is_rounded_once():
    matrix = packed(gram(300))
    found, exact = unpacked(matrix.float()), unpacked(matrix)
    assert float(((found - exact) / exact).abs().max()) <= 2**-24


@pytest.mark.parametrize("dim", DIMS)
def test_a_congruence_is_that_of_the_whole_matrix(dim):
    matrix = gram(dim)
    weight = torch.randn(11, dim, generator=torch.Generator().manual_seed(2)).double()
    found = congruence(weight, packed(matrix))
    exact = weight @ matrix @ weight.T
    assert torch.equal(found, found.T)
    assert float((found - exact).norm()) <= 1e-12 * float(exact.norm())


def test_the_permuted_matrix_has_its_lower_triangle():
    matrix = unpacked(gram(300))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    assert torch.equal(permuted(packed(matrix), order), matrix[order][:, order].tril())


@pytest.fixture
def small_blocks(monkeypatch):
    """Have what works a block at a time take several."""
    monkeypatch.setattr(linalg, "BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dim", DIMS)
def test_what_is_solved_with_a_factor_is_what_torch_solves(dim):
    matrix = gram(dim)
    factor, rung = cholesky_psd(packed(matrix), ridge=0.0, where="here")
    assert rung == "cholesky"
    exact = torch.linalg.cholesky(matrix)
    assert torch.allclose(factor, exact, rtol=1e-9, atol=1e-9)
    assert torch.allclose(inverse_diagonal(factor), torch.linalg.inv(matrix).diagonal(), rtol=1e-6)
    right = torch.randn(dim, 3, generator=torch.Generator().manual_seed(4)).double()
    assert torch.allclose(lower_transposed_times(factor, right), exact.T @ right)
    keep = dim - dim // 3
    found = solve_lower_transposed(factor, right[:keep])
    corner = exact[:keep, :keep]
    assert torch.allclose(corner.T @ found, right[:keep])


@pytest.mark.usefixtures("small_blocks")
def test_a_hidden_layer_is_the_same_from_a_packed_gram():
    matrix = gram(300)
    weights = torch.randn(300, 20, generator=torch.Generator().manual_seed(5)).double()
    whole, found = (nystrom(m, weights, ridge=1e-3, where="") for m in (matrix, packed(matrix)))
    assert torch.equal(whole.refit(200)[1], found.refit(200)[1])


def test_a_ladder_climbs_from_the_matrix_itself():
    """A rung that failed has overwritten what it was given; the next begins with the matrix."""
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(6)).double()
    matrix = packed(x.T @ x - 1e-9 * torch.eye(300).double())
    factor, rung = cholesky_psd(matrix, ridge=0.0, where="here")
    assert rung.startswith("cholesky damped")
    whole = unpacked(matrix)
    assert float((factor @ factor.T - whole).norm()) <= 1e-3 * float(whole.norm())


def test_an_eigendecomposition_that_is_too_wide_is_refused_with_what_it_would_take(monkeypatch):
    monkeypatch.setattr(linalg, "MAX_EIGH_DIM", 299)
    with pytest.raises(
        NumericsError, match=r"down_proj: .* 300 x 300 Gram matrix needs 2,880,000 bytes"
    ):
        eigh_descending(packed(gram(300)), where="down_proj")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_entry_that_is_not_finite_is_seen(bad, dtype):
    tensor = torch.ones(1000, dtype=dtype)
    assert all_finite(tensor)
    tensor[517] = bad
    assert not all_finite(tensor)
