"""Integers in the blocks of llama.cpp, decoded by its own package."""

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from actors.numerics.blocks import LAYOUTS, blocks_of
from actors.numerics.rounding import Rounded, Scales
from planners.model.blocks import BLOCK_TYPES, block_type
from planners.model.scheme import WHOLE_ROW, Scheme

ROWS, WIDTH = 6, 768
SCHEMES = [
    Scheme(bits=bits, group=group, symmetric=symmetric)
    for group in (32, 96, 256, WHOLE_ROW)
    for symmetric in (True, False)
    for bits in range(2, 9)
    if symmetric or bits < 8
]


def matrix(scheme, *, smallest=-16, seed=0):
    """Return random integers and zero points of a scheme, with scales of the stored dtype."""
    generator = torch.Generator().manual_seed(seed)
    half, groups = 2 ** (scheme.bits - 1), scheme.groups(WIDTH)

    def integers(width):
        return torch.randint(-half, half, (ROWS, width), generator=generator).float()

    powers = torch.randint(smallest, 4, (ROWS, groups), generator=generator)
    scale = (1 + torch.rand(ROWS, groups, generator=generator)) * 2.0**powers
    zero = torch.zeros(ROWS, groups) if scheme.symmetric else integers(groups)
    scales = Scales(scale=scale.to(torch.bfloat16).float(), zero=zero)
    return Rounded(codes=integers(WIDTH), scales=scales, scheme=scheme)


def decoded(rounded):
    kind = block_type(rounded.scheme, WIDTH)
    blocks = blocks_of(rounded, kind)
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind.name]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_blocks_decode_to_every_value_exactly(scheme):
    rounded = matrix(scheme)
    assert torch.equal(decoded(rounded), rounded.values())


def test_every_type_was_decoded():
    assert {block_type(scheme, WIDTH).name for scheme in SCHEMES} == BLOCK_TYPES.keys()
    assert LAYOUTS.keys() == BLOCK_TYPES.keys()


@pytest.mark.parametrize("bits", [3, 4])
def test_a_scale_that_is_no_float16_changes_the_values(bits):
    rounded = matrix(Scheme(bits=bits, group=256), smallest=-30)
    assert not torch.equal(decoded(rounded), rounded.values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_zeros_may_have_any_scale(symmetric):
    scheme = Scheme(bits=4, group=256, symmetric=symmetric)
    rounded = matrix(scheme)
    rounded.scales.scale[2, 1] = torch.finfo(torch.bfloat16).tiny
    rounded.codes[2, 256:512] = rounded.scales.zero[2, 1]
    assert torch.equal(decoded(rounded), rounded.values())
