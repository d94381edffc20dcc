"""Reading ahead: shards arrive in the order asked for, while a few threads decode the next ones.

Bounded by construction: at most ``ahead`` shards are read and not yet handed out, so memory does
not grow with the number of shards. Decompression releases the GIL, so threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.types import KINDS, Kind


@dataclass(frozen=True)
class Request:
    """What to read: arguments of ``KVStore.read_shard``."""

    teacher: str
    shard_id: str
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    kinds: Sequence[Kind] = KINDS


def prefetch(
    store: KVStore, requests: Iterable[Request], *, threads: int = 2, ahead: int = 2
) -> Iterator[tuple[Request, EncodedShard]]:
    """Yield every request with its shard, in order. ``requests`` may be endless.

    The first error of a read is raised at its turn; closing the iterator stops reading.

    Raises:
        ValueError: ``threads`` or ``ahead`` is less than one.
        StoreError: as ``KVStore.read_shard``.
    """
    if threads < 1 or ahead < 1:
        raise ValueError(f"threads and ahead must be at least 1, got {threads} and {ahead}")
    return _prefetch(store, iter(requests), threads, ahead)


def _prefetch(
    store: KVStore, requests: Iterator[Request], threads: int, ahead: int
) -> Iterator[tuple[Request, EncodedShard]]:
    waiting: deque[tuple[Request, Future[EncodedShard]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kvdistill-prefetch")
    try:
        for request in requests:
            waiting.append((request, pool.submit(_read, store, request)))
            if len(waiting) >= ahead:
                done, shard = waiting.popleft()
                yield done, shard.result()
        while waiting:
            done, shard = waiting.popleft()
            yield done, shard.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(store: KVStore, request: Request) -> EncodedShard:
    return store.read_shard(
        request.teacher, request.shard_id, request.layers, request.heads, request.kinds
    )
