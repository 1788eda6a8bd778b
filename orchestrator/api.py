"""The entry points to a run, for the command line and for Python."""

import contextlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.backend.ray_cluster import ClusterFacts, connected
from orchestrator.forecast.forecast import forecast_of
from orchestrator.forecast.pricing import Pricing
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.config import RunConfig
from orchestrator.recipe.reading import load_config
from orchestrator.run import run
from orchestrator.rundir.journal import Listener


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHooks:
    """What the caller of a run supplies once the run has been checked.

    Attributes:
        listening: a context manager that yields the listener to all events of the run.
        approve: gets the cluster's facts before any work starts, and may refuse by raising.
        expected: the forecast, for the report to compare with.
        begun: when the caller began, in seconds since the epoch.
    """

    listening: AbstractContextManager[Listener]
    approve: Callable[[ClusterFacts], None] = lambda _: None
    expected: Mapping[str, Any] | None = None
    begun: float = field(default_factory=time.time)


def compress(model: str, *, listener: Listener, **recipe: Any) -> dict[str, Any]:
    """Compress a model and return its report; see `orchestrator.compress`."""
    begun = time.time()

    def started(prepared: Prepared) -> RunHooks:
        expected = forecast_of(prepared, Pricing()).to_json()
        listening = contextlib.nullcontext(listener)
        return RunHooks(listening=listening, expected=expected, begun=begun)

    return compress_as(load_config(None, {**recipe, "model": model}), started)


def compress_as(
    config: RunConfig,
    started: Callable[[Prepared], RunHooks],
    *,
    connect: Callable[..., AbstractContextManager[ClusterFacts]] = connected,
    verify_hashes: bool = False,
) -> dict[str, Any]:
    """Run or resume a recipe, and return the report.

    Args:
        config: the recipe.
        started: see `do_prepared`.
        connect: see `do_prepared`.
        verify_hashes: see `do_prepared`.

    Raises:
        CompressionError: see `planners.errors`; finished work is kept.
    """
    return do_prepared(prepare(config), started, connect=connect, verify_hashes=verify_hashes)


def do_prepared(
    prepared: Prepared,
    started: Callable[[Prepared], RunHooks],
    *,
    connect: Callable[..., AbstractContextManager[ClusterFacts]] = connected,
    verify_hashes: bool = False,
) -> dict[str, Any]:
    """Run or resume a prepared run, and return the report.

    Args:
        prepared: the run.
        started: is called with the prepared run before anything starts.
        connect: see `orchestrator.run.run`.
        verify_hashes: compare the bytes of finished files with their records, not only sizes.

    Raises:
        CompressionError: see `planners.errors`; finished work is kept.
    """
    hooks = started(prepared)
    with hooks.listening as listener:
        return run(
            replace(prepared, begun=hooks.begun),
            listener=listener,
            connect=connect,
            verify_hashes=verify_hashes,
            approve=hooks.approve,
            expected=hooks.expected,
        )
