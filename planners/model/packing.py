"""Packed layout of a symmetric matrix, which stores each entry once: integers only.

The upper triangle is cut into blocks of `ROWS` rows. The block that begins at row a holds columns
a to the last, row-major; the blocks follow each other. So the small square on the diagonal of each
block is whole, and everything below it is left out: (dim + ROWS) / (2 dim) of the full matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ROWS = 256  # smaller saves more, larger multiplies faster; another number is another file format


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows ``[first, last)`` of the upper triangle, from column ``first`` on.

    Attributes:
        first: first row, and first column.
        last: one past the last row.
        dim: of the whole matrix.
        start: position of its first element.
    """

    first: int
    last: int
    dim: int
    start: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return (self.last - self.first, self.dim - self.first)

    @property
    def stop(self) -> int:
        """One past the position of its last element."""
        return self.start + self.shape[0] * self.shape[1]


def blocks_of(dim: int) -> Iterator[Block]:
    """Yield the blocks of a matrix of that width, top to bottom."""
    start = 0
    for first in range(0, dim, ROWS):
        block = Block(first=first, last=min(first + ROWS, dim), dim=dim, start=start)
        yield block
        start = block.stop


def packed_elements(dim: int) -> int:
    """Return how many numbers a packed matrix of that width holds."""
    whole, rest = divmod(dim, ROWS)
    return ROWS * (whole * dim - ROWS * (whole * (whole - 1) // 2)) + rest * rest


def dim_of_packed(num_elements: int) -> int:
    """Return the width of a packed matrix of so many numbers.

    Raises:
        ValueError: no width has that number of elements.
    """
    low, high = 0, num_elements
    while low < high:
        middle = (low + high) // 2
        if packed_elements(middle) < num_elements:
            low = middle + 1
        else:
            high = middle
    if packed_elements(low) != num_elements:
        raise ValueError(f"{num_elements} elements are not a packed symmetric matrix")
    return low
