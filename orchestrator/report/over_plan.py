"""Report workers that used more memory than planned."""

from collections.abc import Mapping

from orchestrator.report.numbers import bytes_text, change

MARGIN = 0.1  # less over the plan is not reported: allocators keep some of the freed memory


def over_plan(measured: Mapping[str, int], planned: int) -> list[str]:
    """Return a line for each worker whose peak exceeds its plan by more than `MARGIN`."""
    return [
        f"{worker} exceeds its plan: {bytes_text(planned)} planned, {bytes_text(peak)} measured "
        f"({change(peak / planned)})"
        for worker, peak in measured.items()
        if planned and peak > (1 + MARGIN) * planned
    ]
