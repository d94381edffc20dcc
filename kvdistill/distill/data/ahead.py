"""Running an iterator in a thread of its own, a few results ahead of whoever reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def ahead(items: Generator[T, None, None], depth: int) -> Iterator[T]:
    """Yield the items of a generator; at most ``depth`` are ready and not yet asked for.

    An error of the generator is raised here, at its turn. However the reading ends, the thread
    is over and the generator closed before this is.
    """
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(1, "kvdistill-collate")
    try:
        waiting.extend(pool.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        items.close()
