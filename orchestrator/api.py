"""The one way into a run, for the command line and for Python."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from orchestrator.backend.ray_cluster import ClusterFacts
from orchestrator.forecast.forecast import forecast_of
from orchestrator.forecast.terms import Pricing
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.config import RunConfig
from orchestrator.recipe.reading import load_config
from orchestrator.run import run
from orchestrator.rundir.journal import Listener


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHooks:
    """What whoever wants a run has to say once it has been checked.

    Attributes:
        listening: gives who hears of every event, for as long as the run takes.
        approve: sees the cluster before anything is asked of it, and may refuse by raising.
        expected: what the run is to take, for the report to compare.
    """

    listening: AbstractContextManager[Listener]
    approve: Callable[[ClusterFacts], None] = lambda _: None
    expected: Mapping[str, Any] | None = None


def compress(model: str, *, listener: Listener, **recipe: Any) -> dict[str, Any]:
    """Compress a model and return its report; see `orchestrator.compress`."""

    def started(prepared: Prepared) -> RunHooks:
        expected = forecast_of(prepared, Pricing()).to_json()
        return RunHooks(listening=contextlib.nullcontext(listener), expected=expected)

    return compress_as(load_config(None, {**recipe, "model": model}), started)


def compress_as(
    config: RunConfig,
    started: Callable[[Prepared], RunHooks],
    *,
    dashboard: bool = False,
    verify_hashes: bool = False,
) -> dict[str, Any]:
    """Do what a recipe says, or what is left of it, and return the report.

    Args:
        config: the recipe.
        started: see `do_prepared`.
        dashboard: likewise.
        verify_hashes: likewise.

    Raises:
        CompressionError: see `planners.errors`; what is done is kept.
    """
    how = {"dashboard": dashboard, "verify_hashes": verify_hashes}
    return do_prepared(prepare(config), started, **how)


def do_prepared(
    prepared: Prepared,
    started: Callable[[Prepared], RunHooks],
    *,
    dashboard: bool = False,
    verify_hashes: bool = False,
) -> dict[str, Any]:
    """Do a run that was checked, or what is left of it, and return the report.

    Args:
        prepared: the run.
        started: is given the checked run before anything starts.
        dashboard: start Ray's dashboard with a local cluster.
        verify_hashes: compare the bytes of what is done, not only sizes.

    Raises:
        CompressionError: see `planners.errors`; what is done is kept.
    """
    said = started(prepared)
    with said.listening as listener:
        return run(
            prepared,
            listener=listener,
            dashboard=dashboard,
            verify_hashes=verify_hashes,
            approve=said.approve,
            expected=said.expected,
        )
