"""Metrics of a run in Ray, for its dashboard and Grafana."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.util import metrics

from orchestrator.backend.executor import FailureClass
from planners.units.kinds import DONE, KINDS

LOSSES: tuple[str, ...] = (  # kinds of events that cost a worker
    FailureClass.PREEMPTED,
    FailureClass.NODE_LOST,
    FailureClass.WORKER_CRASHED,
    FailureClass.STALLED,
    FailureClass.OUT_OF_MEMORY,
)


def metered(
    listener: Callable[[dict[str, Any]], None],
    *,
    reasons: Iterable[str],
    price_per_hour: float,
) -> Callable[[dict[str, Any]], None]:
    """Return a listener that also updates Ray's metrics of a run.

    Args:
        listener: gets every event too.
        reasons: kinds of events after which work is retried.
        price_per_hour: of a worker.
    """
    meters = Meters(reasons, price_per_hour)

    def listen(event: dict[str, Any]) -> None:
        meters(event)
        listener(event)

    return listen


class Meters:
    """Ray's metrics of a run, updated by its events; served on ``/metrics`` of the driver's node.

    Names are ``compress_*`` here and ``ray_compress_*`` there.
    """

    def __init__(self, reasons: Iterable[str], price_per_hour: float) -> None:
        """Create the metrics; this process must be connected to a cluster."""
        self._reasons = frozenset(reasons)
        self._price, self._begun = price_per_hour, time.monotonic()
        self._workers: set[str] = set()
        self._tokens = metrics.Counter(
            "compress_tokens", description="Tokens that passed a stage.", tag_keys=("kind",)
        )
        self._seconds = metrics.Histogram(
            "compress_unit_seconds",
            description="Seconds of a unit of work or a microbatch, on its worker.",
            boundaries=[0.1, 1, 10, 60, 600, 3600],
            tag_keys=("kind",),
        )
        self._layers = metrics.Gauge(
            "compress_layers_done", description="Layers that this driver compressed."
        )
        self._queue = metrics.Gauge(
            "compress_queue_depth",
            description="Units or microbatches left in a phase.",
            tag_keys=("phase",),
        )
        self._lost = metrics.Gauge(
            "compress_workers_lost", description="Workers lost so far.", tag_keys=("reason",)
        )
        self._retries = metrics.Gauge(
            "compress_retries",
            description="Times that work was retried.",
            tag_keys=("reason",),
        )
        self._memory = metrics.Gauge(
            "compress_worker_peak_bytes",
            description="Memory that a worker used at its peak.",
            tag_keys=("worker",),
        )
        self._written = metrics.Counter(
            "compress_written_bytes", description="Bytes of the files of units."
        )
        self._money = metrics.Gauge(
            "compress_money_spent",
            description="Workers times hours times the price of one; 0 without a price.",
        )
        self._trained = metrics.Gauge(
            "compress_training_tokens",
            description="Tokens that a training of the whole model has seen, trials included.",
        )
        self._loss = metrics.Gauge(
            "compress_training_loss", description="Loss of the last step of such a training."
        )
        self._counts: Counter[str] = Counter()
        self._phase, self._left = "", 0
        for reason in LOSSES:  # so that a panel shows 0 before the first
            self._lost.set(0, tags={"reason": reason})
        for reason in self._reasons:
            self._retries.set(0, tags={"reason": reason})
        self._layers.set(0)
        self._trained.set(0)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Count one event."""
        kind = event["kind"]
        if kind == "phase begins":
            self._phase, self._left = event["unit"], event["tokens"]
        elif kind in self._reasons:
            self._counts[kind] += 1
            self._retries.set(self._counts[kind], tags={"reason": kind})
            if kind in LOSSES:
                self._lost.set(self._counts[kind], tags={"reason": kind})
        elif kind == "training":  # its tokens are those since the start, not of one unit
            self._count_training(event)
        elif event["worker"] and event["start"]:
            self._count_unit(kind, event)
        if self._phase:
            self._queue.set(self._left, tags={"phase": self._phase})
        if kind == "phase ends":
            self._phase = ""
        hours = (time.monotonic() - self._begun) / 3600
        self._money.set(hours * len(self._workers) * self._price)

    def _count_training(self, event: Mapping[str, Any]) -> None:
        self._trained.set(event["tokens"])
        if event["loss"] is not None:
            self._loss.set(event["loss"])

    def _count_unit(self, kind: str, event: Mapping[str, Any]) -> None:
        self._seconds.observe(event["seconds"], tags={"kind": kind})
        self._left = max(0, self._left - 1)
        if event["worker"].startswith("worker-"):  # not the driver, nor the verifying process
            self._workers.add(event["worker"])
        if event["tokens"]:
            self._tokens.inc(event["tokens"], tags={"kind": kind})
        if event["written_bytes"]:
            self._written.inc(event["written_bytes"])
        if event["peak_bytes"]:
            self._memory.set(event["peak_bytes"], tags={"worker": event["worker"]})
        if kind in KINDS and KINDS[kind].state == DONE:
            self._counts["layers"] += 1
            self._layers.set(self._counts["layers"])
