"""The eigendecomposition that every site shares, and its ladder."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.numerics.linalg import DAMPINGS, eigh_descending
from planners.errors import NumericsError

GRAMS = st.builds(
    lambda seed, dim, tokens: gram_of(seed, dim, tokens),
    st.integers(0, 2**32),
    st.integers(1, 24),
    st.integers(1, 40),  # fewer tokens than channels: a singular gram
)


def gram_of(seed, dim, tokens):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    return x.T @ x


@given(GRAMS)
def test_values_and_vectors_make_the_matrix_again(gram):
    found = eigh_descending(gram, where="site 3")
    again = (found.vectors * found.values) @ found.vectors.T
    assert torch.allclose(again, gram, atol=1e-10 * float(gram.trace()))
    identity = torch.eye(len(gram), dtype=torch.float64)
    assert torch.allclose(found.vectors.T @ found.vectors, identity, atol=1e-10)
    assert found.rung == "eigh"


@given(GRAMS)
def test_values_descend(gram):
    values = eigh_descending(gram, where="site 3").values
    assert torch.equal(values, values.sort(descending=True).values)


@given(GRAMS)
def test_the_largest_entry_of_every_vector_is_positive(gram):
    vectors = eigh_descending(gram, where="site 3").vectors
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


@given(GRAMS)
def test_single_precision_is_decomposed_in_double(gram):
    found = eigh_descending(gram.float(), where="site 3")
    exact = eigh_descending(gram.float().double(), where="site 3")
    assert torch.equal(found.values, exact.values)
    assert torch.equal(found.vectors, exact.vectors)


@given(GRAMS, st.sampled_from((float("nan"), float("inf"), -float("inf"))), st.data())
def test_an_entry_that_is_not_finite_is_refused_with_its_place(gram, bad, data):
    index = data.draw(st.integers(0, len(gram) - 1))
    gram[index, 0] = bad
    with pytest.raises(NumericsError, match="layer 7, resid_mlp"):
        eigh_descending(gram, where="layer 7, resid_mlp")


@given(GRAMS)
def test_the_matrix_is_not_changed(gram):
    before = gram.clone()
    eigh_descending(gram, where="site 3")
    assert torch.equal(gram, before)


@pytest.fixture
def failing_eigh(monkeypatch):
    """Make LAPACK fail to converge for the first so many calls."""
    eigh = torch.linalg.eigh

    def fail_first(num_calls):
        left = iter(range(num_calls))

        def stubborn(matrix):
            if next(left, None) is not None:
                raise torch.linalg.LinAlgError("failed to converge")
            return eigh(matrix)

        monkeypatch.setattr(torch.linalg, "eigh", stubborn)

    return fail_first


@pytest.mark.parametrize("num_failures", range(1, len(DAMPINGS)))
def test_a_decomposition_that_fails_is_damped_and_says_so(failing_eigh, num_failures):
    gram = gram_of(0, 12, 30)
    exact = eigh_descending(gram, where="site 3")
    failing_eigh(num_failures)
    found = eigh_descending(gram, where="site 3")
    assert found.rung == f"eigh damped {DAMPINGS[num_failures]:g} on cpu"
    assert torch.allclose(found.values, exact.values)  # what damping added is taken away again
    assert torch.allclose(found.vectors, exact.vectors, atol=1e-8)


def test_when_no_rung_holds_the_place_is_named_and_nothing_is_returned(failing_eigh):
    failing_eigh(len(DAMPINGS))
    with pytest.raises(NumericsError, match="site 3"):
        eigh_descending(gram_of(0, 4, 9), where="site 3")
