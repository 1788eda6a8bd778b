"""Detect cloud preemption notices on a node, and drain it.

A cloud announces to a machine that it will be preempted; Ray does not check for that. This does, on
each node, and has Ray drain the node: nothing new is placed there, and the driver moves its work.

    compress-cluster watch-node

watches one node while it runs, and drains it on SIGTERM too; put it after ``ray start`` in the
setup of a cluster. A run on a cluster that it did not start itself watches the nodes anyway.
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
    """Yield a function that returns a notice once this process has received SIGTERM."""
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
        node: Ray's id of the node; empty is this process's node.
        metadata: base URL of the metadata service.
        say: prints what is watched, and each notice.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    # In this order: Ray handles SIGTERM in its own way once it is connected.
    with preemption.attached(address) as here, on_sigterm() as stopped:
        watched = node or here

        def drain(notice: Notice) -> None:
            preemption.drain(
                watched, seconds=notice.seconds, message=f"preemption notice from {notice.source}"
            )
            say(f"{notice.source}: node {watched} is preempted in {notice.seconds:.0f} s")

        say(f"watching node {watched}")
        watch(drain, base=metadata, stopped=stopped)
