"""The steps in which widths are cut: multiples that hardware and kernels like.

On a GPU a product with a width that is not a multiple of 8 takes up to six times as long as one
that is wider but is (measured on an H200), and the fast attention kernels refuse such heads.
"""

import math
from collections.abc import Mapping

from planners.method import Option, OptionSpec
from planners.model.shape import ModelShape

LIKED = 8  # elements: 16 bytes in half precision
LARGE, LARGE_HEAD = 512, 64  # smaller widths are cut as finely as a method can

MULTIPLE_OF = OptionSpec(
    name="multiple_of",
    default=0,
    minimum=0,
    former="round_to",
    help="every kept width is a multiple of this: 64 or 128 for quantised kernels; 0: of 8, and "
    "heads narrower than 64 and matrices smaller than 512 in the method's own fine steps",
)
TENSOR_PARALLEL = OptionSpec(
    name="tensor_parallel",
    default=1,
    minimum=1,
    help="the GPUs over which the result will be divided; the multiple holds for the part of each",
)


def width_steps(shape: ModelShape, options: Mapping[str, Option]) -> dict[str, int]:
    """Return module (mlp, qk, vo or residual) -> the step in which its width may be cut.

    Heads are divided over GPUs whole, and so is the residual stream. A multiple that is given holds
    for the widths of linears; the width of a head is then a multiple of it or, above 8, of 8, so
    that that of all KV heads together is a multiple of it.
    """
    asked, ranks = int(options[MULTIPLE_OF.name]), int(options[TENSOR_PARALLEL.name])
    multiple = asked or LIKED
    head = LIKED if shape.head_dim >= LARGE_HEAD else 1
    if asked:
        kv_heads = max(1, shape.num_kv_heads // ranks)
        head = math.lcm(min(asked, LIKED), asked // math.gcd(asked, kv_heads))
    # Rope pairs stay whole.
    return {"mlp": multiple * ranks, "qk": math.lcm(head, 2), "vo": head, "residual": multiple}


def rank_step(dims: tuple[int, int], options: Mapping[str, Option]) -> int:
    """Return the step of the rank of a linear of (out, in), of which every GPU holds the whole."""
    asked = int(options[MULTIPLE_OF.name])
    return asked or (LIKED if min(dims) >= LARGE else 1)


def refuses_division(shape: ModelShape, options: Mapping[str, Option]) -> str:
    """Return why a model cannot be divided over so many GPUs, or an empty string."""
    ranks = int(options[TENSOR_PARALLEL.name])
    if shape.num_heads % ranks or (shape.num_kv_heads % ranks and ranks % shape.num_kv_heads):
        return (
            f"tensor_parallel is {ranks}, by which its {shape.num_heads} heads "
            f"({shape.num_kv_heads} of keys and values) cannot be divided"
        )
    return ""
