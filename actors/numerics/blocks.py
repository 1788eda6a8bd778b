"""Quantised matrices as the blocks of llama.cpp's types, every integer as it is.

The layouts are those of ``ggml/src/ggml-common.h``. What is stored of each block: ``d``, the scale
of its group as float16; the integers, in pieces of a few bits; and in the types with sub-scales 1
for each of these, and the integer that means zero for each of their minima.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import UInt8
from torch import Tensor

from actors.numerics.rounding import Rounded
from planners.model.blocks import BlockType

# From d as two bytes, the integers, and the one that means zero: the bytes of each block, in parts.
Layout = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def blocks_of(rounded: Rounded, kind: BlockType) -> UInt8[Tensor, "rows bytes"]:
    """Return a matrix of integers as blocks of a type that `block_type` found for its scheme.

    A scale that is no float16 is rounded to one, so compare what the blocks decode to with the
    matrix. A block of zeros has the scale 0, whatever that of its group.
    """
    scale, zero = rounded.scales.scale, rounded.scales.zero
    rows = len(rounded.codes)
    codes = rounded.codes.view(rows, -1, kind.size)
    each = codes.shape[1] // scale.shape[1]  # blocks of a group
    scale, zero = (part.repeat_interleave(each, 1)[..., None] for part in (scale, zero))
    middle = 2 ** ((rounded.scheme.bits if kind.own_zero else kind.bits) - 1)
    steps = codes - zero
    d = torch.where((steps == 0).all(-1, keepdim=True), 0, scale).to(torch.float16)
    integers, zeros = (codes, zero) if kind.own_zero else (steps, torch.zeros_like(zero))
    parts = LAYOUTS[kind.name](
        d.view(torch.uint8), (integers + middle).to(torch.uint8), (zeros + middle).to(torch.uint8)
    )
    assert sum(part.shape[-1] for part in parts) == kind.bytes
    return torch.cat(parts, dim=-1).view(rows, -1)


def _fold(q: UInt8[Tensor, "rows blocks size"], count: int, apart: int, bits: int) -> Tensor:
    """Return bytes that hold so many integers of so many bits each, those that lie so far apart."""
    runs = q.view(*q.shape[:2], -1, count, apart)
    shifts = bits * torch.arange(count, dtype=torch.uint8)[:, None]
    return (runs << shifts).sum(-2, dtype=torch.uint8).flatten(2)


def _same(value: int, like: Tensor, count: int) -> Tensor:
    return like.new_full((*like.shape[:2], count), value)


def _q4_0(d: Tensor, q: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return d, _fold(q, 2, 16, 4)


def _q5_0(d: Tensor, q: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return d, _fold(q >> 4, 8, 1, 1), _fold(q & 15, 2, 16, 4)


def _q8_0(d: Tensor, q: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return d, q ^ 128  # in two's complement


def _q2_k(d: Tensor, q: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
    return (1 | zero << 4).expand(*q.shape[:2], 16), _fold(q, 4, 32, 2), d, d


def _q3_k(d: Tensor, q: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    # Sub-scales are stored plus 32: 33 is 1 in the low four bits and 2 in the two above.
    ones = _same(0x11, q, 8), _same(0b10101010, q, 4)
    return _fold(q >> 2, 8, 32, 1), _fold(q & 3, 4, 32, 2), *ones, d


def _ones_and_minima(q: Tensor, zero: Tensor) -> Tensor:
    """Return eight sub-scales and eight minima of six bits, in twelve bytes."""
    first = _same(1, q, 4), zero | zero >> 4 << 6
    last = 1 | (zero & 15) << 4
    return torch.cat((first[0], *(part.expand(*q.shape[:2], 4) for part in (first[1], last))), -1)


def _q4_k(d: Tensor, q: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
    return d, d, _ones_and_minima(q, zero), _fold(q, 2, 32, 4)


def _q5_k(d: Tensor, q: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
    scales = _ones_and_minima(q, zero)
    return d, d, scales, _fold(q >> 4, 8, 32, 1), _fold(q & 15, 2, 32, 4)


def _q6_k(d: Tensor, q: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return _fold(q & 15, 2, 64, 4), _fold(q >> 4, 4, 32, 2), _same(1, q, 16), d


LAYOUTS: Mapping[str, Layout] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
