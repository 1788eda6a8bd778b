"""Where the elements of a packed symmetric matrix lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planners.model.packing import ROWS, blocks_of, dim_of_packed, packed_elements

DIMS = st.integers(0, 5 * ROWS)


@given(DIMS)
def test_the_blocks_tile_a_packed_matrix(dim):
    blocks = list(blocks_of(dim))
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks)][: len(blocks)]
    assert sum(b.shape[0] for b in blocks) == dim
    assert packed_elements(dim) == (blocks[-1].stop if blocks else 0)


@given(DIMS)
def test_the_number_of_elements_says_the_width(dim):
    assert dim_of_packed(packed_elements(dim)) == dim


def test_a_number_of_elements_that_no_width_has_is_refused():
    with pytest.raises(ValueError, match=r"5 elements"):
        dim_of_packed(5)


def test_the_widest_gram_of_a_70b_model_takes_half():
    assert packed_elements(28672) == pytest.approx(0.5 * 28672**2, rel=0.01)
