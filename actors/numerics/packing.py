"""Quantised matrices as tensors of a file, in the formats of compressed-tensors.

Integers are packed without gaps: weight i of a row occupies the bits from ``i * bits`` on, counted
from the lowest of the first 32-bit word. Of two e2m1 values in a byte the first is in the low half.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from actors.numerics.rounding import E2M1, ROWS, Rounded, Scales
from planners.model.scheme import FP8, INT, MXFP4, NVFP4, WORD, Scheme

PARTS: Mapping[str, tuple[str, ...]] = {  # of a matrix; the first takes the place of ``weight``
    INT: ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    NVFP4: ("weight_packed", "weight_scale", "weight_global_scale"),
    MXFP4: ("weight_packed", "weight_scale"),
    FP8: ("weight", "weight_scale"),
}
MX_BIAS = 127


def pack_integers(codes: Int[Tensor, "rows width"], bits: int) -> Int[Tensor, "rows words"]:
    """Return integers from ``-2^(bits-1)`` on as 32-bit words, row by row."""
    return torch.cat([_packed(rows, bits) for rows in torch.split(codes, ROWS)])


def _packed(codes: Int[Tensor, "rows width"], bits: int) -> Int[Tensor, "rows words"]:
    rows, width = codes.shape
    words = -(-width * bits // WORD)
    filled = torch.zeros(rows, -(-width // WORD) * WORD, dtype=torch.int64, device=codes.device)
    filled[:, :width] = codes.to(torch.int64) + 2 ** (bits - 1)
    by_place = filled.view(rows, -1, WORD)
    sums = torch.zeros(rows, by_place.shape[1], bits + 1, dtype=torch.int64, device=codes.device)
    for place in range(WORD):
        word, offset = divmod(place * bits, WORD)
        value = by_place[..., place] << offset
        sums[..., word] += value & 0xFFFFFFFF
        sums[..., word + 1] += value >> WORD  # the bits that do not fit into the word
    packed = sums[..., :bits].reshape(rows, -1)[:, :words]
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def unpack_integers(
    words: Int[Tensor, "rows words"], bits: int, width: int
) -> Int[Tensor, "rows width"]:
    """Return the integers that `pack_integers` packed, as int8."""
    return torch.cat([_unpacked(rows, bits, width) for rows in torch.split(words, ROWS)])


def _unpacked(words: Int[Tensor, "rows words"], bits: int, width: int) -> Int[Tensor, "rows width"]:
    rows, groups = len(words), -(-width // WORD)
    filled = torch.zeros(rows, groups * bits, dtype=torch.int64, device=words.device)
    filled[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    by_word = filled.view(rows, groups, bits)
    found = torch.empty(rows, groups, WORD, dtype=torch.int8, device=words.device)
    for place in range(WORD):
        word, offset = divmod(place * bits, WORD)
        value = by_word[..., word] >> offset
        if offset + bits > WORD:
            value = value | (by_word[..., word + 1] << (WORD - offset))
        found[..., place] = ((value & (2**bits - 1)) - 2 ** (bits - 1)).to(torch.int8)
    return found.view(rows, -1)[:, :width].contiguous()


def parts_of(rounded: Rounded, stored: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a quantised matrix; ``stored`` is the dtype of scales of integers."""
    scheme, codes, scales = rounded.scheme, rounded.codes, rounded.scales
    if scheme.grid == INT:
        found = {
            "weight_packed": pack_integers(codes.to(torch.int8), scheme.bits),
            "weight_scale": scales.scale.to(stored),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            zero = pack_integers(scales.zero.T.to(torch.int8), scheme.bits).T
            found["weight_zero_point"] = zero.contiguous()
        return found
    if scheme.grid == FP8:
        return {
            "weight": codes.to(torch.float8_e4m3fn),
            "weight_scale": scales.scale.to(stored),
        }
    found = {"weight_packed": _packed_fp4(codes)}
    if scheme.grid == MXFP4:
        exponent = torch.log2(scales.scale).round().to(torch.int32) + MX_BIAS
        return {**found, "weight_scale": exponent.to(torch.uint8)}
    return {
        **found,
        "weight_scale": (scales.scale * scales.common).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([scales.common], dtype=torch.float32),
    }


def integers_of(parts: Mapping[str, Tensor], scheme: Scheme) -> Rounded:
    """Return a matrix of integers from `parts_of` it."""
    packed, scale = parts["weight_packed"], parts["weight_scale"].to(torch.float32)
    width = int(parts["weight_shape"][1])
    codes = unpack_integers(packed, scheme.bits, width).to(torch.float32)
    zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        stored = parts["weight_zero_point"].T
        zero = unpack_integers(stored, scheme.bits, len(codes)).T.to(torch.float32)
    return Rounded(codes=codes, scales=Scales(scale=scale, zero=zero), scheme=scheme)


def values_of(parts: Mapping[str, Tensor], scheme: Scheme) -> Float[Tensor, "rows width"]:
    """Return the weights of a quantised matrix in float32, from `parts_of` it."""
    if scheme.grid == INT:
        return integers_of(parts, scheme).values()
    scale = parts["weight_scale"]
    if scheme.grid == FP8:
        return parts["weight"].to(torch.float32) * scale.to(torch.float32)
    codes = _unpacked_fp4(parts["weight_packed"])
    if scheme.grid == MXFP4:
        scale = torch.exp2(scale.to(torch.float32) - MX_BIAS)
    else:
        scale = scale.to(torch.float32) / parts["weight_global_scale"].to(torch.float32)
    return Rounded(
        codes=codes, scales=Scales(scale=scale, zero=torch.zeros_like(scale)), scheme=scheme
    ).values()


def _packed_fp4(codes: Float[Tensor, "rows width"]) -> UInt8[Tensor, "rows half"]:
    values = torch.tensor(E2M1, device=codes.device)
    index = torch.bucketize(codes.abs(), values).to(torch.uint8)
    index |= (codes < 0).to(torch.uint8) << 3
    pairs = index.view(len(codes), -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _unpacked_fp4(packed: UInt8[Tensor, "rows half"]) -> Float[Tensor, "rows width"]:
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    both = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return values[both.to(torch.int64)]
