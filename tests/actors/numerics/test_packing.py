"""Quantised matrices as tensors of a file, against compressed-tensors, which others read with."""

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from actors.numerics.packing import (
    pack_integers,
    parts_of,
    unpack_integers,
    values_of,
)
from actors.numerics.rounding import round_to_nearest
from planners.model.scheme import (
    FP8,
    GRIDS,
    MXFP4,
    NVFP4,
    WHOLE_ROW,
    Scheme,
    arguments_of,
    scheme_of,
    stored_bits,
)

GRIDS_OF_FLOATS = (
    Scheme(bits=4, group=16, grid=NVFP4),
    Scheme(bits=4, group=32, grid=MXFP4),
    Scheme(bits=8, group=WHOLE_ROW, grid=FP8),
)
SCHEMES = (
    *(Scheme(bits=b, group=g) for b in range(2, 9) for g in (32, WHOLE_ROW)),
    *(Scheme(bits=b, group=16, symmetric=False) for b in range(2, 9)),
    *GRIDS_OF_FLOATS,
)


def weight_of(rows, width):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=generator)


def parts_and_values(scheme, rows=13, width=96):
    weight = weight_of(rows, width)
    rounded = round_to_nearest(weight, torch.ones(width), scheme, stored=torch.bfloat16)
    return parts_of(rounded, torch.bfloat16), rounded.values()


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 200), st.integers(0, 2**32))
def test_integers_are_packed_as_compressed_tensors_does(bits, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, width), generator=generator, dtype=torch.int8)
    packed = pack_integers(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_integers(packed, bits, width), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_stored_has_the_values_that_were_computed(scheme):
    parts, values = parts_and_values(scheme)
    assert torch.equal(values_of(parts, scheme), values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compressed_tensors_reads_the_same_values(scheme):
    parts, values = parts_and_values(scheme)
    arguments = QuantizationArgs(**arguments_of(scheme))
    if parts["weight_scale"].dtype == torch.bfloat16:  # as in a model that is loaded in float32
        parts["weight_scale"] = parts["weight_scale"].float()
    reader = BaseCompressor.get_value_from_registry(GRIDS[scheme.grid].packing)
    its = reader.decompress(parts, QuantizationScheme(targets=["Linear"], weights=arguments))
    found = its["weight"].float()
    if scheme.grid in (NVFP4, MXFP4):  # it computes them in bfloat16
        assert torch.allclose(found, values, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_plans_count_the_bytes_that_are_written(scheme, rows):
    parts, _ = parts_and_values(scheme, rows=rows)
    written = sum(tensor.nbytes for tensor in parts.values())
    assert stored_bits(scheme, rows, 96) == 8 * written


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_do_not_fill_a_word_are_counted_whole(bits, symmetric):
    scheme = Scheme(bits=bits, group=WHOLE_ROW, symmetric=symmetric)
    parts, values = parts_and_values(scheme, rows=3, width=37)
    assert stored_bits(scheme, 3, 37) == 8 * sum(tensor.nbytes for tensor in parts.values())
    assert torch.equal(values_of(parts, scheme), values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_config_says_which_scheme_it_was(scheme):
    assert scheme_of(arguments_of(scheme)) == scheme
    read_by_others = QuantizationArgs(**arguments_of(scheme)).model_dump(mode="json")
    assert scheme_of(read_by_others) == scheme
