"""Reading ahead: shards arrive in the order asked for, while a few threads read the next ones.

    for request, shard in prefetch(store, requests, threads=2, ahead=2):
        ...

Bounded by construction: while the caller works on one shard, at most ``ahead`` more are read or
being read, and a shard that the caller lets go of is gone. Memory does not grow with the number
of shards. Decompression, checksums and copies release the GIL, so threads are enough.

The iterator belongs to one thread; the store under it may be shared by any number of iterators.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.types import KINDS, Kind


@dataclass(frozen=True)
class ShardRequest:
    """What to read: arguments of ``KVStore.read_shard``."""

    teacher: str
    shard_id: str
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    kinds: Sequence[Kind] = KINDS


def prefetch(
    store: KVStore, requests: Iterable[ShardRequest], *, threads: int = 2, ahead: int = 2
) -> Generator[tuple[ShardRequest, EncodedShard], None, None]:
    """Yield every request with its shard, in order. ``requests`` may be endless.

    Requests are drawn in the caller's thread, ``ahead`` + 1 before the first shard is handed out.
    The first error of a read is raised at its turn; closing the iterator stops reading.

    Raises:
        ValueError: ``threads`` or ``ahead`` is less than one.
        StoreError: as ``KVStore.read_shard``.
    """
    if threads < 1 or ahead < 1:
        raise ValueError(f"threads and ahead must be at least 1, got {threads} and {ahead}")
    return _prefetch(store, iter(requests), threads, ahead)


def _prefetch(
    store: KVStore, requests: Iterator[ShardRequest], threads: int, ahead: int
) -> Generator[tuple[ShardRequest, EncodedShard], None, None]:
    waiting: deque[tuple[ShardRequest, Future[EncodedShard]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kvdistill-prefetch")
    try:
        for request in requests:
            waiting.append((request, pool.submit(_read_request, store, request)))
            if len(waiting) > ahead:
                yield _oldest(waiting)
        while waiting:
            yield _oldest(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _oldest(
    waiting: deque[tuple[ShardRequest, Future[EncodedShard]]],
) -> tuple[ShardRequest, EncodedShard]:
    """The oldest request, when it is read. In a frame of its own, which keeps no shard alive."""
    request, shard = waiting.popleft()
    return request, shard.result()


def _read_request(store: KVStore, request: ShardRequest) -> EncodedShard:
    return store.read_shard(
        request.teacher, request.shard_id, request.layers, request.heads, request.kinds
    )


T = TypeVar("T")


_END: Any = object()


def prefetch_items(items: Generator[T, None, None], depth: int) -> Iterator[T]:
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


# MERGED-DOC distill.data.ahead
# Running an iterator in a thread of its own, a few results ahead of whoever reads them.
