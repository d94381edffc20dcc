"""Time reads of a store with whichever kvdistill is on ``PYTHONPATH``; run by ``store.py``.

One JSON object per line on standard input, for example ``{"store": "s", "codec": "int8",
"clock": "wall", "threads": 1}``; the answer to each is its duration in seconds.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from itertools import product
from typing import Any

import numpy as np

from kvdistill.store import prefetch as prefetching
from kvdistill.store.reader import KVStore

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
KINDS = ("key", "value")
ShardRequest = getattr(prefetching, "ShardRequest", None) or prefetching.Request
_, _, _, DEPTH = inspect.signature(prefetching.prefetch).parameters  # has had other names


def in_order(store: str, codec: str, threads: int) -> None:
    """Read all shards in order, as an epoch does, from a newly opened store."""
    opened = KVStore.open(store)
    if threads == 1:
        for shard_id in opened.shard_ids:
            touch_all(opened.read_shard(codec, shard_id))
        return
    requests = [ShardRequest(codec, shard_id) for shard_id in opened.shard_ids]
    for _, shard in prefetching.prefetch(opened, requests, threads=threads, **{DEPTH: threads}):
        touch_all(shard)


def at_random(
    store: str, codec: str, sample_ids: list[str], layers: list[int], one_by_one: bool
) -> None:
    """Read some samples and layers, with one call per sample or one per layer and head."""
    opened = KVStore.open(store)
    heads = range(opened.teacher(codec).groups[0].num_key_value_heads)
    for sample_id, kind in product(sample_ids, KINDS):
        if not one_by_one:
            opened.read_sample(codec, sample_id, kind, layers)
            continue
        for layer, head in product(layers, heads):
            opened.read(codec, sample_id, layer, head, kind)


def touch_all(shard: Any) -> None:
    """Read every page, so that memory-mapped arrays are actually loaded."""
    for array in shard.arrays.values():
        touch(array)


def touch(array: np.ndarray) -> None:
    rows = max(1, 4096 // (array.shape[-1] * array.itemsize))
    array[..., ::rows, 0].sum()


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        clock = CLOCKS[task.pop("clock")]
        work = in_order if "threads" in task else at_random
        started = clock()
        work(**task)
        print(clock() - started, flush=True)


if __name__ == "__main__":
    main()
