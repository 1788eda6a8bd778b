"""Read one item ahead of its consumer."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """Yield the items in order; while the caller uses one, a thread produces the next.

    So reading overlaps with converting, copying to a device and computing, at the cost of one more
    item in memory. An error in producing an item is raised where the item would have been yielded.
    """
    end = object()
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc] # not the end, hence one of the items
            del item  # else it would stay in memory while waiting for the next
