"""Reading one step ahead of whoever uses what is read."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """Yield the items in order; while the caller uses one, the next is made in a thread.

    So reading overlaps with converting, copying to a device and computing, and one item more than
    without it is in memory. An error in making an item is raised where the item would have come.
    """
    end = object()
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc] # not the end, hence one of the items
            del item  # else it would live on while the next is waited for
