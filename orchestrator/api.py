"""The one way into a run, for the command line and for Python."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from orchestrator.config import RunConfig, load_config
from orchestrator.journal import Listener
from orchestrator.prepare import Prepared, prepare
from orchestrator.run import run

Shown = Callable[[Prepared], AbstractContextManager[Listener]]


def compress(model: str, *, listener: Listener, **recipe: Any) -> dict[str, Any]:
    """Compress a model and return its report; see `orchestrator.compress`."""
    config = load_config(None, {**recipe, "model": model})
    return compress_as(config, shown=lambda _: contextlib.nullcontext(listener))


def compress_as(
    config: RunConfig, *, shown: Shown, dashboard: bool = False, verify_hashes: bool = False
) -> dict[str, Any]:
    """Do what a recipe says, or what is left of it, and return the report.

    Args:
        config: the recipe.
        shown: is given the checked run before anything starts, and opens who listens to it.
        dashboard: start Ray's dashboard with a local cluster.
        verify_hashes: compare the bytes of what is done, not only sizes.

    Raises:
        CompressionError: see `planners.errors`; what is done is kept.
    """
    prepared = prepare(config)
    with shown(prepared) as listener:
        return run(prepared, listener=listener, dashboard=dashboard, verify_hashes=verify_hashes)
