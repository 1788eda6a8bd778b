"""Device and memory that a run may plan with."""

import os
from typing import Literal

from orchestrator.prepare.evaluation_plan import exact_dtype
from orchestrator.recipe.config import RunConfig
from planners.batching import TokenBatching
from planners.errors import ClusterError
from planners.planning import Workload

GIB = 2**30
USABLE_DEVICE = 0.9  # of a device's memory: the rest is its context and the allocator's
USABLE = 0.8  # share of a machine's memory that its workers may plan with


def workload_of(
    config: RunConfig, batching: TokenBatching, *, device: str, stored_dtype: str
) -> Workload:
    """Return what a recipe asks of its workers.

    Args:
        config: the recipe.
        batching: of the calibration tokens.
        device: where workers compute: ``cpu``, or any other.
        stored_dtype: of the model.
    """
    stores = [u for u in (config.out, config.stats) if "://" in u and not u.startswith("file://")]
    return Workload(
        batching=batching,
        evaluation_dtype=exact_dtype(device, stored_dtype),
        statistics_dtype=config.statistics_dtype,
        num_workers=config.workers,
        worker_bytes=int((config.worker_gib or 0) * GIB),
        mapped=device == "cpu" and not stores,
    )


def chosen_device(device: str, address: str) -> Literal["cpu", "cuda"]:
    """Return where workers compute; ``device`` is as given, ``address`` that of the cluster.

    ``auto`` is what the workers have: CUDA on a cluster with any GPU, or that can grow one; without
    a cluster, on a machine with one.

    Raises:
        ClusterError: the cluster cannot be asked.
    """
    if device != "auto":
        return "cuda" if device == "cuda" else "cpu"
    if address == "local":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    from orchestrator.backend.ray_cluster import (
        most_gpus,  # imports Ray: seconds, where none is asked
    )

    try:
        return "cuda" if most_gpus(address) > 0 else "cpu"
    except ClusterError as error:
        hint = f"{error.hint}; a plan with --device cpu or cuda asks no cluster"
        raise ClusterError(str(error), hint=hint) from error


def usable_gib(device: str, workers: int) -> float:
    """Return a worker's share of this machine, or of the smallest device here: it has one alone."""
    if device == "cuda":
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        if found:
            return float(min(each.total_memory for each in found) * USABLE_DEVICE / GIB)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB * USABLE / workers
