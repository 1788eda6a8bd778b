"""Detect cloud preemption notices on a node, and drain it.

A cloud tells a machine that it will be taken away; Ray does not listen. This does, on each node,
and has Ray drain the node: nothing new is placed there, and the driver moves what is there.

    compress-cluster watch-node

does it for one node for as long as that runs, and on SIGTERM too; put it behind ``ray start`` in
the setup of a cluster. A run on a cluster that it did not start itself watches the nodes that it
finds, without that.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from orchestrator.backend import preemption
from orchestrator.backend.cloud_notices import Notice, watch

SIGTERM_SECONDS = 30.0


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[], Notice | None]]:
    """Give a source of notices that has one once this process got SIGTERM."""
    found: list[Notice] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        found.append(Notice(seconds=SIGTERM_SECONDS, source="SIGTERM"))

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield lambda: found[0] if found else None
    finally:
        signal.signal(signal.SIGTERM, before)


def watch_node(address: str, *, node: str, metadata: str, say: Callable[[str], None]) -> None:
    """Watch a node until it gets a notice, and drain it.

    Args:
        address: of the Ray cluster.
        node: Ray's id of the node; empty is the one of this process.
        metadata: base URL of the metadata service.
        say: is told what is watched and what came.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    # In this order: Ray handles SIGTERM in its own way once it is connected.
    with preemption.attached(address) as here, on_sigterm() as stopped:
        watched = node or here

        def drain(notice: Notice) -> None:
            preemption.drain(watched, seconds=notice.seconds, message=f"notice of {notice.source}")
            say(f"{notice.source}: node {watched} goes in {notice.seconds:.0f} s")

        say(f"watches node {watched}")
        watch(drain, base=metadata, stopped=stopped)
