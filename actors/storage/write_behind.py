"""Write files in threads while their makers go on, bounded by bytes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
WRITERS = 2  # threads on a CPU: one hashes and writes while another one waits for the disk


class WriteBehind(Generic[T]):
    """Writes under way, by name; each is asked for once, and raises there what it raised."""

    def __init__(self, *, writers: int = WRITERS) -> None:
        self._threads = ThreadPoolExecutor(writers, thread_name_prefix="write-behind")
        self._writes: dict[str, tuple[int, Future[T]]] = {}

    def begin(self, name: str, write: Callable[[], T], *, held: int, most: int) -> None:
        """Begin a write, once all that is held for writes is at most ``most`` bytes.

        Args:
            name: to ask for it by.
            write: returns when its files are durable.
            held: bytes that it keeps in memory until then.
            most: bytes that all writes under way may keep; a write that keeps more than that is
                done before this method returns.
        """
        for _, earlier in list(self._writes.values()):
            if self._held + held > most:
                earlier.exception()  # waits; it is raised where that write is asked for
        future = self._threads.submit(write)
        self._writes[name] = held, future
        if held > most:
            future.exception()

    @property
    def _held(self) -> int:
        return sum(size for size, write in self._writes.values() if not write.done())

    def result(self, name: str) -> T:
        """Return what a write returned, after waiting for it."""
        return self._writes.pop(name)[1].result()
