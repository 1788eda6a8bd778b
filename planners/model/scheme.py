"""How the weights of a linear are stored as few bits: the grids, and what they take."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

SCALE_BITS = 16
WHOLE_ROW = -1  # a group that is as wide as the row
INT, NVFP4, MXFP4, FP8 = "int", "nvfp4", "mxfp4", "fp8"
WORD = 32  # bits in which integers are packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One kind of values that a weight may have, times the scale of its group.

    Attributes:
        name: as recipes have it.
        bits: of one weight; several where a scheme chooses.
        group: weights that share a scale; 0 where a scheme chooses.
        scale_bits: of the scale of a group.
        packing: the format of compressed-tensors that stores it.
    """

    name: str
    bits: tuple[int, ...]
    group: int = 0
    scale_bits: int = SCALE_BITS
    packing: str


GRIDS: Mapping[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid(name=INT, bits=tuple(range(2, 9)), packing="pack-quantized"),
        # e2m1 values; the scale of a group is an e4m3 value times one float32 of the whole matrix.
        Grid(name=NVFP4, bits=(4,), group=16, scale_bits=8, packing="nvfp4-pack-quantized"),
        # e2m1 values; the scale of a group is a power of two.
        Grid(name=MXFP4, bits=(4,), group=32, scale_bits=8, packing="mxfp4-pack-quantized"),
        Grid(name=FP8, bits=(8,), group=WHOLE_ROW, packing="float-quantized"),  # e4m3 values
    )
}


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Scheme:
    """How a matrix is quantised.

    Attributes:
        bits: of one weight.
        group: consecutive weights of a row that share a scale; `WHOLE_ROW` is all of them.
        symmetric: zero is in the middle of the grid; else each group stores its zero point too.
        grid: one of `GRIDS`.
    """

    bits: int
    group: int
    symmetric: bool = True
    grid: str = INT

    def __str__(self) -> str:
        """Return a short name, such as ``4/32``."""
        name = f"{self.bits}/{'row' if self.group == WHOLE_ROW else self.group}"
        return f"{name}{'' if self.symmetric else 'z'}{'' if self.grid == INT else '-' + self.grid}"

    def groups(self, width: int) -> int:
        """Return the groups in a row of a matrix."""
        return 1 if self.group == WHOLE_ROW else width // self.group


def stored_bits(scheme: Scheme, rows: int, width: int) -> int:
    """Return the bits of a matrix of (rows, width) as it is stored: values, scales, zero points.

    Rows of integers are filled up to whole words of 32 bits.
    """
    grid, groups = GRIDS[scheme.grid], scheme.groups(width)
    row = scheme.bits * width
    if scheme.grid == INT:
        row = -(-row // WORD) * WORD
    total = rows * (row + groups * grid.scale_bits)
    if not scheme.symmetric:  # packed along the rows
        total += groups * -(-rows * scheme.bits // WORD) * WORD
    # The shape, two numbers of 64 bits; or the float32 that is common to all scales.
    return total + {INT: 128, NVFP4: 32}.get(scheme.grid, 0)


def nominal_bits(scheme: Scheme, rows: int, width: int) -> int:
    """Return the bits of values, scales and zero points alone, without any filling."""
    each = GRIDS[scheme.grid].scale_bits + (0 if scheme.symmetric else scheme.bits)
    return rows * (scheme.bits * width + scheme.groups(width) * each)


def dividing_group(group: int, width: int) -> int:
    """Return the largest power of two that is at most a group and divides a width."""
    if group == WHOLE_ROW:
        return WHOLE_ROW
    return gcd(group, width) if group & (group - 1) == 0 else (group if width % group == 0 else 0)


def scheme_from_json(data: Mapping[str, Any]) -> Scheme:
    """Return the scheme that `to_json` wrote."""
    return Scheme(**data)


def arguments_of(scheme: Scheme) -> dict[str, object]:
    """Return how compressed-tensors describes a scheme in a config."""
    strategy = {NVFP4: "tensor_group"}.get(
        scheme.grid, "channel" if scheme.group == WHOLE_ROW else "group"
    )
    found: dict[str, object] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.grid == INT else "float",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
    }
    if strategy != "channel":
        found["group_size"] = scheme.group
    if scheme.grid == NVFP4:
        found["scale_dtype"] = "torch.float8_e4m3fn"
    if scheme.grid == MXFP4:
        found["scale_dtype"] = "torch.uint8"
    return found


def scheme_of(arguments: Mapping[str, object]) -> Scheme:
    """Return the scheme that `arguments_of` described."""
    bits, group = (
        int(str(arguments["num_bits"])),
        int(str(arguments.get("group_size") or WHOLE_ROW)),
    )
    grid = INT
    if arguments["type"] != "int":
        grid = FP8 if bits == 8 else NVFP4 if group == 16 else MXFP4  # noqa: PLR2004 of the formats
    return Scheme(bits=bits, group=group, symmetric=bool(arguments["symmetric"]), grid=grid)
