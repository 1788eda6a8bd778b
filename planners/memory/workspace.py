"""Peak memory of factorisations, in bytes: formulas of what the numerics allocate.

Each formula gives the peak of one kind of factorisation, without the gram itself.
"""

DOUBLE = 8  # bytes of a float64
SINGLE = 4  # of a float32
PANEL = 1024  # columns that are solved at a time
SEARCHED = 7  # copies of a block of rows, in float32, while scales are searched


def nystrom_bytes(dim: int, out_dim: int) -> int:
    """Return the bytes of the factor, the rotated output weights, and three panels of columns."""
    return DOUBLE * (dim * dim + dim * out_dim + 3 * dim * PANEL)


def low_rank_bytes(out_dim: int, in_dim: int, rank: int) -> int:
    """Return the largest of three phases: squares of the narrow side, its axes, both factors.

    A wide weight is held in float64 for the outputs' gram and once more for its factor; a tall one
    is processed in blocks, beside the factor of its inputs' gram.
    """
    narrow, long = min(out_dim, in_dim), max(out_dim, in_dim)
    square, panel = narrow * narrow, PANEL * (long + narrow)
    if out_dim <= in_dim:
        moments = (
            narrow * long + 2 * square + panel,
            eigh_bytes(narrow) // DOUBLE + square,
            square + narrow * long + rank * long,
        )
    else:
        moments = (
            4 * square + panel,
            eigh_bytes(narrow) // DOUBLE + 2 * square,
            2 * square + rank * (2 * narrow + long) + PANEL * narrow,
        )
    return DOUBLE * max(moments)


def change_bytes(out_dim: int, in_dim: int, rank: int) -> int:
    """Return the bytes of a change of another matrix: both and their difference beside a Gram."""
    return low_rank_bytes(out_dim, in_dim, rank) + DOUBLE * (in_dim * in_dim + 4 * out_dim * in_dim)


def aligned_bytes(units: int, hidden: int) -> int:
    """Return the bytes of matching the units of two MLPs: all gains, and both in float64."""
    return DOUBLE * (units * units + 6 * units * hidden)


def stack_bytes(out_dim: int, in_dim: int, layers: int) -> int:
    """Return the bytes of factoring matrices of several layers together.

    They are held as they are whitened and beside it as they are combined, with their approximation;
    the Gram matrix and its factor; then an eigendecomposition of the wider side.
    """
    stack = layers * out_dim * in_dim
    return DOUBLE * (4 * stack + 2 * in_dim * in_dim) + eigh_bytes(max(out_dim, in_dim))


def eigh_bytes(dim: int) -> int:
    """Return the bytes of the matrix, its vectors, and LAPACK's workspace of twice its size."""
    return DOUBLE * 4 * dim * dim


def rounding_bytes(rows: int, width: int) -> int:
    """Return the bytes of rounding matrices of one input: its factor, and two copies of them.

    A panel of the factor is held beside it, and scales; or, before, what the search for scales
    needs of a block of rows.
    """
    columns = 2 * SINGLE * rows * width + SINGLE * PANEL * width + SINGLE * rows * width // 16
    return DOUBLE * width * width + max(columns, SEARCHED * SINGLE * min(rows, PANEL) * width)
