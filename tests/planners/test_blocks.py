"""Which type of llama.cpp holds which integers: the smallest whose grid and block take them."""

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from planners.model.blocks import BLOCK_TYPES, block_type
from planners.model.scheme import GRIDS, INT, WHOLE_ROW, Scheme

WIDTH = 768


@pytest.mark.parametrize(
    ("group", "symmetric", "names"),  # of 2 to 8 bits
    [
        (32, True, "Q4_0 Q4_0 Q4_0 Q5_0 Q8_0 Q8_0 Q8_0"),
        (128, True, "Q4_0 Q4_0 Q4_0 Q5_0 Q8_0 Q8_0 Q8_0"),
        (256, True, "Q2_K Q3_K Q4_0 Q5_0 Q6_K Q8_0 Q8_0"),
        (WHOLE_ROW, True, "Q2_K Q3_K Q4_0 Q5_0 Q6_K Q8_0 Q8_0"),
        # The difference of two integers of 8 bits has 9.
        (64, False, "Q4_0 Q4_0 Q5_0 Q8_0 Q8_0 Q8_0 -"),
        (256, False, "Q2_K Q4_0 Q4_K Q5_K Q8_0 Q8_0 -"),
        (16, True, "- - - - - - -"),
    ],
)
def test_the_smallest_type_that_holds_a_scheme_is_taken(group, symmetric, names):
    schemes = [Scheme(bits=bits, group=group, symmetric=symmetric) for bits in range(2, 9)]
    found = [block_type(scheme, WIDTH) for scheme in schemes]
    assert " ".join(kind.name if kind else "-" for kind in found) == names


def test_the_blocks_of_a_row_that_is_one_group_must_divide_it():
    row = Scheme(bits=3, group=WHOLE_ROW)
    assert [(k := block_type(row, w)) and k.name for w in (512, 352, 688)] == ["Q3_K", "Q4_0", None]


def test_floats_have_no_type():
    floats = [grid for grid in GRIDS.values() if grid.name != INT]
    schemes = [Scheme(bits=each.bits[0], group=each.group, grid=each.name) for each in floats]
    assert [block_type(scheme, WIDTH) for scheme in schemes] == [None] * len(floats)


def test_blocks_have_the_sizes_that_llama_cpp_gives_them():
    sizes = {name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in BLOCK_TYPES}
    assert {name: (kind.size, kind.bytes) for name, kind in BLOCK_TYPES.items()} == sizes
