"""Ctrl-C: once, to stop as soon as unfinished work is saved; twice, to quit at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interruption:
    """Whether the user has requested a stop."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Yield what the first Ctrl-C sets; the second raises KeyboardInterrupt.

    Outside the main thread, where Python allows no signal handlers, Ctrl-C is left as it is.
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
