"""Ctrl-C: once, to stop when what is under way is safe; twice, to leave now."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interruption:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Give what the first Ctrl-C sets; the second raises KeyboardInterrupt, as without this block.

    Outside the main thread, where Python lets nobody handle signals, Ctrl-C does what it did.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interruption.requested:
            signal.default_int_handler(number, frame)
        interruption.requested = True

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
