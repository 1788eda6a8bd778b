"""Which type of llama.cpp holds the integers of a scheme exactly.

A type stores blocks of consecutive weights of a row. Where all sub-scales of a block are 1, its
values are ``d * (q - z)``, with d a float16, q an integer of so many bits and z the middle of the
grid; some types store z as well. So a block holds part of one group, and several share its scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from planners.model.scheme import INT, WHOLE_ROW, Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """A type of llama.cpp's ``ggml/src/ggml-common.h``.

    Attributes:
        name: there and in a GGUF file.
        size: weights of a block.
        bytes: of a block.
        bits: of one integer.
        own_zero: a block stores which integer means zero.
    """

    name: str
    size: int
    bytes: int
    bits: int
    own_zero: bool = False


BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType(name="Q4_0", size=32, bytes=18, bits=4),
        BlockType(name="Q5_0", size=32, bytes=22, bits=5),
        BlockType(name="Q8_0", size=32, bytes=34, bits=8),
        BlockType(name="Q2_K", size=256, bytes=84, bits=2, own_zero=True),
        BlockType(name="Q3_K", size=256, bytes=110, bits=3),
        BlockType(name="Q4_K", size=256, bytes=144, bits=4, own_zero=True),
        BlockType(name="Q5_K", size=256, bytes=176, bits=5, own_zero=True),
        BlockType(name="Q6_K", size=256, bytes=210, bits=6),
    )
}


def block_type(scheme: Scheme, width: int) -> BlockType | None:
    """Return the smallest type that holds every value of a scheme; none if no type does.

    Args:
        scheme: of a matrix.
        width: its inputs.
    """
    if scheme.grid != INT:
        return None
    group = width if scheme.group == WHOLE_ROW else scheme.group
    fits = [kind for kind in BLOCK_TYPES.values()
            if group % kind.size == 0 and _bits(scheme, kind) <= kind.bits]  # fmt: skip
    return min(fits, key=lambda kind: kind.bytes / kind.size, default=None)


def _bits(scheme: Scheme, kind: BlockType) -> int:
    """Return the bits of an integer; differences to zero points have a sign on top."""
    return scheme.bits + (not scheme.symmetric and not kind.own_zero)
