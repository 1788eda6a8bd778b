"""What a run of this machine does at the same time.

Ray starts while the driver is imported; workers are imported while the driver reads the model.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from actors.storage.files import Directory
from actors.storage.sources import ModelSource
from orchestrator.backend.executor import EarlyActor, Resources
from orchestrator.backend.ray_cluster import ClusterFacts, connected, started_ahead
from orchestrator.backend.ray_executor import spawn_early
from orchestrator.recipe.config import RunConfig, out_of
from orchestrator.rundir.layout import READY

STAGE = "actors.worker.stage"  # its module, which is not imported here: that takes seconds
Connect = Callable[..., AbstractContextManager[ClusterFacts]]


@contextmanager
def cluster_for(
    config: RunConfig, source: ModelSource | None, *, dashboard: bool, modules: str
) -> Iterator[Connect]:
    """Yield how a recipe's run connects to its cluster; one of its own starts now, if it needs one.

    A run on this machine waits seconds for Ray, most of them without using a core, and then for the
    imports of the driver: torch, transformers and pyarrow. Here they pass side by side.

    Args:
        config: the recipe.
        source: its model; None for one on the Hub, which may first have to be downloaded.
        dashboard: start Ray's dashboard with a local cluster.
        modules: is imported meanwhile, with all that it imports.
    """
    how: dict[str, Any] = {"dashboard": dashboard}
    if config.address != "local" or source is None or _is_ready(config, source):
        yield partial(connected, **how)
        return
    # In a thread the imports, not Ray: its processes end with the thread that started them.
    importing = threading.Thread(target=import_module, args=(modules,), daemon=True)
    importing.start()
    with started_ahead(num_cpus=config.workers * config.threads, dashboard=dashboard) as ahead:
        early = _early(config)
        importing.join()
        try:
            yield partial(connected, **how, ahead=replace(ahead, early=early))
        finally:
            early.clear()  # no handle may outlive the connection


def _early(config: RunConfig) -> list[EarlyActor]:
    """Start the processes of a run's workers."""
    from orchestrator.prepare.machine import chosen_device  # by now it is imported, or nearly

    device = chosen_device(config.device, config.address)
    resources = Resources.of_worker(config.threads, device)
    names = [f"worker-{slot}" for slot in range(config.workers)]  # as the pool will name them
    return [spawn_early(STAGE, resources=resources, shown=name) for name in names]


def _is_ready(config: RunConfig, source: ModelSource) -> bool:
    return Directory(out_of(config, source.name)).size(READY) is not None
