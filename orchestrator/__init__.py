"""Run a compression on a Ray cluster: the only package that uses one."""

from collections.abc import Callable
from typing import Any

__all__ = ["compress"]


def compress(
    model: str = "tiny", *, listener: Callable[[dict[str, Any]], None] | None = None, **recipe: Any
) -> dict[str, Any]:
    """Compress a model and return its report, as ``report.json`` holds it.

    The arguments are the keys of a recipe: ``compress("tiny", method="modegpt", keep_fraction=0.8,
    calibration={"sequences": 32}, out="runs/mine")``. The same call again resumes the run.

    Args:
        model: a directory, an ``s3://`` or ``gs://`` URI, a Hub id, or an alias.
        listener: is called with each event, as a row of ``events/``.
        recipe: any other key of a recipe.

    Raises:
        CompressionError: see `planners.errors`; finished work is kept.
    """
    from orchestrator import (
        api,
    )  # here: it imports torch and Ray, which are slow to load for --help
    from orchestrator.rundir.journal import quiet

    return api.compress(model, listener=listener or quiet, **recipe)
