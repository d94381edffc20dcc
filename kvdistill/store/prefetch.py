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
) -> Generator[tuple[Request, EncodedShard], None, None]:
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
    store: KVStore, requests: Iterator[Request], threads: int, ahead: int
) -> Generator[tuple[Request, EncodedShard], None, None]:
    waiting: deque[tuple[Request, Future[EncodedShard]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kvdistill-prefetch")
    try:
        for request in requests:
            waiting.append((request, pool.submit(_read, store, request)))
            if len(waiting) > ahead:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first(
    waiting: deque[tuple[Request, Future[EncodedShard]]],
) -> tuple[Request, EncodedShard]:
    """The oldest request, when it is read. In a frame of its own, which keeps no shard alive."""
    request, shard = waiting.popleft()
    return request, shard.result()


def _read(store: KVStore, request: Request) -> EncodedShard:
    return store.read_shard(
        request.teacher, request.shard_id, request.layers, request.heads, request.kinds
    )
