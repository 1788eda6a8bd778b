"""RUN: the only package that knows a cluster."""

from collections.abc import Callable
from typing import Any

__all__ = ["compress"]


def compress(
    model: str = "tiny", *, listener: Callable[[dict[str, Any]], None] | None = None, **recipe: Any
) -> dict[str, Any]:
    """Compress a model and return its report, as ``report.json`` holds it.

    The words are those of a recipe: ``compress("tiny", method="modegpt", keep_fraction=0.8,
    calibration={"sequences": 32}, out="runs/mine")``. The same call again goes on where this one
    stopped.

    Args:
        model: a directory, an ``s3://`` or ``gs://`` URI, a Hub id, or an alias.
        listener: is told what happens, as rows of ``events/``; nobody is, if it is not given.
        recipe: any other key of a recipe.

    Raises:
        CompressionError: see `planners.errors`; what is done is kept.
    """
    from orchestrator import api  # here: it imports torch and Ray, and --help has no time for them
    from orchestrator.rundir.journal import quiet

    return api.compress(model, listener=listener or quiet, **recipe)
