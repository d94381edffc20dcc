"""Prefetching: shards arrive in the order requested, while a few threads read the next ones.

    for request, shard in prefetch(store, requests, threads=2, depth=2):
        ...

Memory is bounded: while the caller works on one shard, at most ``depth`` more are read or being
read, and no reference to a yielded shard is kept. Decompression, checksums and copies release
the GIL, so threads suffice. An iterator belongs to one thread; the store under it may be shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.types import KINDS, Kind

T = TypeVar("T")

_END: Final[Any] = object()


@dataclass(frozen=True)
class ShardRequest:
    """What to read: the arguments of ``KVStore.read_shard``."""

    teacher: str
    shard_id: str
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    kinds: Sequence[Kind] = KINDS


def prefetch(
    store: KVStore, requests: Iterable[ShardRequest], *, threads: int = 2, depth: int = 2
) -> Generator[tuple[ShardRequest, EncodedShard], None, None]:
    """Yield every request with its shard, in order. ``requests`` may be endless.

    Requests are drawn in the caller's thread, ``depth + 1`` of them before the first shard is
    yielded. The first error of a read is raised at its turn; closing the iterator stops reading.

    Raises:
        ValueError: ``threads`` or ``depth`` is less than one.
        StoreError: as ``KVStore.read_shard``.
    """
    if threads < 1 or depth < 1:
        raise ValueError(f"threads and depth must be at least 1, got {threads} and {depth}")
    return _prefetch(store, iter(requests), threads, depth)


def _prefetch(
    store: KVStore, requests: Iterator[ShardRequest], threads: int, depth: int
) -> Generator[tuple[ShardRequest, EncodedShard], None, None]:
    waiting: deque[tuple[ShardRequest, Future[EncodedShard]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kvdistill-prefetch")
    try:
        for request in requests:
            wanted = (request.layers, request.heads, request.kinds)
            read = pool.submit(store.read_shard, request.teacher, request.shard_id, *wanted)
            waiting.append((request, read))
            if len(waiting) > depth:
                yield _oldest(waiting)
        while waiting:
            yield _oldest(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _oldest(
    waiting: deque[tuple[ShardRequest, Future[EncodedShard]]],
) -> tuple[ShardRequest, EncodedShard]:
    # A function of its own: a local of the generator would keep the shard alive across the yield.
    request, shard = waiting.popleft()
    return request, shard.result()


def prefetch_items(items: Generator[T, None, None], depth: int) -> Iterator[T]:
    """Run a generator in a thread of its own, at most ``depth`` items ahead of the consumer.

    An error of the generator is raised here, at its turn. However the iteration ends, the thread
    has finished and the generator is closed by then.
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
