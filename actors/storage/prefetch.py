"""Read ahead of a consumer."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_turn(calls: Iterable[Callable[[], T]], *, ahead: int) -> Iterator[T]:
    """Yield what the calls return, in their order; while the caller uses one, threads do the next.

    So reading overlaps with converting, copying to a device and computing. Beside the result that
    is used, at most ``ahead`` wait or are being made. An error of a call is raised where its result
    would have been yielded.
    """
    left = iter(calls)
    coming: collections.deque[Future[T]] = collections.deque()
    with ThreadPoolExecutor(max_workers=ahead, thread_name_prefix="read-ahead") as threads:

        def submit(count: int) -> None:
            for _, call in zip(range(count), left, strict=False):
                coming.append(threads.submit(call))

        try:
            submit(ahead)
            while coming:
                item = coming.popleft().result()
                submit(1)
                yield item
                del item  # else it would stay in memory while waiting for the next
        finally:
            for each in coming:
                each.cancel()


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """Yield the items in order; while the caller uses one, a thread produces the next.

    For items that can only be produced one after the other; else like `in_turn`.
    """
    end = object()
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc] # not the end, hence one of the items
            del item  # else it would stay in memory while waiting for the next
