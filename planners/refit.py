"""Refit, the second pass: its option, the sequences it holds out, the dampings it tries."""

import math

from planners.method import OptionSpec
from planners.model.cost import linear_dims
from planners.model.form import dense_form
from planners.model.shape import ModelShape

REVISION = 2  # raised when the same input would give different bytes
HELD_OUT = 8  # one sequence in eight, at the end, is held out
MIN_SEQUENCES = 2  # one to fit, one to choose by
# Relative to the mean of the gram's diagonal; the held-out loss chooses one, or no refit at all.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Where the result is quantised: of the correction for other inputs, and for the stream's own error.
ROUNDING_RIDGES = (1e-2, 1e-1)
STREAM_SHARE = 0.5  # of the stream's own error that a linear makes up for

OPTION = OptionSpec(
    name="refit",
    default=False,
    choices=(False, True),
    help="a second pass, layer after layer: refits o_proj and down_proj to the compressed layers "
    "before them; of what is quantised, rounds all linears again on what those leave",
)

DRAFT_COPIES = 2  # of the layers, as drafted and as refitted, until one of them is the result
LIVE_BOUNDARIES = 3  # before a layer, between its halves, and after it
STREAMS = 2 + 1 / HELD_OUT  # dense, refitted, and drafted on the held-out sequences alone
GRAMS = 4  # of fitted and of held-out tokens, damped, and its factor
LAYERS = 4  # dense, drafted, refitted so far, and the one being built

Rows = list[tuple[int, int]]


def workspace_bytes(shape: ModelShape, *, layer_bytes: int) -> int:
    """Return the bytes that refitting one layer needs on top of a forward pass."""
    dim, out_dim = max(
        (inner, out)
        for kind in range(len(shape.kinds))
        for role in ("o_proj", "down_proj")
        for out, inner in [linear_dims(shape, dense_form(shape, kind), role)]
    )
    return LAYERS * layer_bytes + 8 * (GRAMS * dim * dim + 2 * dim * out_dim)


def disk_bytes(result_bytes: int, *, stream_bytes: int) -> int:
    """Return the bytes that the second pass keeps on disk until the result is chosen."""
    return DRAFT_COPIES * result_bytes + math.ceil(LIVE_BOUNDARIES * STREAMS * stream_bytes)


def cuts(num_sequences: int, *, size: int) -> tuple[Rows, Rows]:
    """Return the fitted and the held-out microbatches, as row ranges."""
    held = num_sequences - max(1, num_sequences // HELD_OUT)

    def cut(first: int, last: int) -> Rows:
        return [(a, min(a + size, last)) for a in range(first, last, size)]

    return cut(0, held), cut(held, num_sequences)
