"""A budget and what each cut costs -> how much of what to keep."""

from collections.abc import Callable, Sequence

from planners.errors import PlanError


def largest_width(
    widths: Sequence[int], count: Callable[[int], int], *, before: int, keep_fraction: float
) -> int:
    """Return the widest of ``widths`` that stays within the budget.

    Args:
        widths: candidates, ascending.
        count: width -> parameters of the whole model; does not fall with the width.
        before: parameters of the input model.
        keep_fraction: target, parameters after over parameters before.

    Raises:
        PlanError: even the narrowest candidate is over the budget; the message says how small it
            can get.
    """
    low, high = 0, len(widths)
    while low < high:
        middle = (low + high) // 2
        if count(widths[middle]) <= keep_fraction * before:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        smallest = count(widths[0]) / before
        raise PlanError(
            f"keep_fraction {keep_fraction} cannot be met: the smallest result of this method "
            f"keeps {smallest:.4f} of the parameters",
            hint=f"use --keep-fraction {smallest + 5e-5:.4f} or more",
        )
    return widths[low - 1]
