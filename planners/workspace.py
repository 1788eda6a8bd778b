"""What a unit of compression holds at its peak, in bytes: formulas of what the numerics allocate.

A unit has the worker's memory to itself: the layers of the pass are let go before it. Statistics on
a local disk are mapped, not held. Each formula has the largest moment of one kind of factorisation.
"""

from planners.cost import BYTES_OF, layer_parameters
from planners.plan import ModelShape, Statistic, dense_form

DOUBLE = 8  # bytes of a float64
PANEL = 1024  # columns that are solved at a time


def unit_bytes(shape: ModelShape, statistics: frozenset[Statistic]) -> int:
    """Return what the dearest unit of compression that these statistics serve holds."""
    taps = {s.tap for s in statistics if s.kind in ("gram", "normed_gram")}
    layer = layer_parameters(shape, dense_form(shape)) * BYTES_OF[shape.dtype]
    needs = [0]
    if "mlp_hidden" in taps:
        needs.append(nystrom_bytes(shape.intermediate, shape.hidden))
    if "attn_in" in taps:
        needs.append(low_rank_bytes(shape.intermediate, shape.hidden))
    if taps & {"resid_attn", "resid_mlp", "resid_out"}:
        needs.append(eigh_bytes(shape.hidden))
    return 2 * layer + max(needs)  # as it was read, and as it is written


def nystrom_bytes(dim: int, out_dim: int) -> int:
    """Return the factor, the turned output weights, and three panels of columns."""
    return DOUBLE * (dim * dim + dim * out_dim + 3 * dim * PANEL)


def low_rank_bytes(dim: int, out_dim: int) -> int:
    """Return a weight in float64, both its factors, and the eigendecomposition on the way."""
    return DOUBLE * 2 * dim * out_dim + eigh_bytes(min(dim, out_dim)) + DOUBLE * out_dim * out_dim


def eigh_bytes(dim: int) -> int:
    """Return the matrix, its vectors, and twice that which LAPACK works in."""
    return DOUBLE * 4 * dim * dim
