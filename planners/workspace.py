"""What factorisations hold at their peak, in bytes: formulas of what the numerics allocate.

Each formula has the largest moment of one kind of factorisation; the gram itself is not in it.
"""

DOUBLE = 8  # bytes of a float64
PANEL = 1024  # columns that are solved at a time


def nystrom_bytes(dim: int, out_dim: int) -> int:
    """Return the factor, the turned output weights, and three panels of columns."""
    return DOUBLE * (dim * dim + dim * out_dim + 3 * dim * PANEL)


def low_rank_bytes(dim: int, out_dim: int) -> int:
    """Return a weight in float64, both its factors, and the eigendecomposition on the way."""
    return DOUBLE * 2 * dim * out_dim + eigh_bytes(min(dim, out_dim)) + DOUBLE * out_dim * out_dim


def eigh_bytes(dim: int) -> int:
    """Return the matrix, its vectors, and twice that which LAPACK works in."""
    return DOUBLE * 4 * dim * dim
