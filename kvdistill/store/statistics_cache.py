"""Merged statistics of the committed shards, kept so that they are merged once.

The file's name says which shards went in (and when they were committed), so it is never stale;
losing it costs only the time to merge again.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
import xxhash

from kvdistill.store.layout import COMMIT
from kvdistill.store.statistics import ChannelStatistics


def cache_file(teacher: Path, shard_ids: Sequence[str]) -> Path:
    """Where the merged statistics of exactly these commits belong."""
    digest = xxhash.xxh3_64()
    for shard_id in shard_ids:
        commit = teacher / "shards" / shard_id / COMMIT
        digest.update(f"{shard_id} {commit.stat().st_mtime_ns}\n".encode())
    return teacher / f"statistics.{digest.hexdigest()}.npz"


def load(path: Path) -> dict[str, ChannelStatistics] | None:
    """Read a cached file; None if there is none, or it is damaged and must be made again."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                name.replace(".", "/"): ChannelStatistics.from_array(arrays[name])
                for name in arrays.files
            }
    except (FileNotFoundError, zipfile.BadZipFile, ValueError):
        return None


def save(path: Path, statistics: Mapping[str, ChannelStatistics]) -> None:
    """Write the cache in one step and drop older ones. A read-only store stays without."""
    temporary = path.with_name(f".{uuid4().hex}.npz")
    arrays = {name.replace("/", "."): part.to_array() for name, part in statistics.items()}
    with contextlib.suppress(OSError):
        np.savez(temporary, allow_pickle=False, **arrays)
        for old in path.parent.glob("statistics.*.npz"):
            old.unlink(missing_ok=True)
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
