"""Workers that took more memory than the plan gave them, in words."""

from collections.abc import Mapping

from orchestrator.report.numbers import bytes_text, change

MARGIN = 0.1  # over the plan by less is not told: allocators keep some of what was freed


def over_plan(measured: Mapping[str, int], planned: int) -> list[str]:
    """Return a line for each worker whose peak is over its plan by more than a margin."""
    return [
        f"{worker} is over its plan: {bytes_text(planned)} planned, {bytes_text(peak)} measured "
        f"({change(peak / planned)})"
        for worker, peak in measured.items()
        if planned and peak > (1 + MARGIN) * planned
    ]
