"""The device and memory that a run may use."""

import os
from typing import Literal

from orchestrator.prepare.evaluation_plan import EXACT
from orchestrator.recipe.config import RunConfig
from planners.batching import TokenBatching
from planners.errors import ClusterError
from planners.planning import Workload

GIB = 2**30
USABLE_DEVICE = 0.9  # of a device's memory: the rest is its context and the allocator's
USABLE = 0.8  # share of a machine's memory that its workers may plan with


def workload_of(config: RunConfig, batching: TokenBatching, *, device: str) -> Workload:
    """Return the workload that a recipe gives its workers.

    Args:
        config: the recipe.
        batching: of the calibration tokens.
        device: where workers compute: ``cpu``, or any other.
    """
    stores = [u for u in (config.out, config.stats) if "://" in u and not u.startswith("file://")]
    return Workload(
        batching=batching,
        evaluation_dtype=EXACT,
        statistics_dtype=config.statistics_dtype,
        num_workers=config.workers,
        worker_bytes=int((config.worker_gib or 0) * GIB),
        mapped=device == "cpu" and not stores,
        on_host=device == "cpu",
    )


def chosen_device(device: str, address: str) -> Literal["cpu", "cuda"]:
    """Return where workers compute; ``device`` is as given, ``address`` that of the cluster.

    ``auto`` is CUDA on a cluster that has a GPU or can scale up to one, and, without a cluster, on
    a machine that has one.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if device != "auto":
        return "cuda" if device == "cuda" else "cpu"
    if address == "local":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    from orchestrator.backend.ray_cluster import (
        most_gpus,  # here, because importing Ray takes seconds
    )

    try:
        return "cuda" if most_gpus(address) > 0 else "cpu"
    except ClusterError as error:
        hint = f"{error.hint}; with --device cpu or cuda a plan needs no cluster"
        raise ClusterError(str(error), hint=hint) from error


def usable_gib(device: str, workers: int) -> float:
    """Return the GiB of a worker: its share of this machine, or all of the smallest GPU here."""
    if device == "cuda":
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        if found:
            return float(min(each.total_memory for each in found) * USABLE_DEVICE / GIB)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB * USABLE / workers
