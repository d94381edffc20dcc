"""Summaries and verification of a store, in this process or on a Dask scheduler.

Neither needs a model; ``reextract`` compares a store with its teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvdistill.errors import MissingExtra
from kvdistill.store.maintenance import Finding, verify_store
from kvdistill.store.reader import KVStore
from kvdistill.store.summary import (
    importance_histogram,
    largest_norms,
    plot_teacher,
    summarise_teacher,
)
from kvdistill.types import KINDS


@contextmanager
def dask_scheduler(address: str | None) -> Iterator[Any]:
    """Compute on a distributed scheduler, or on threads of this process; yields its client or None.

    Raises:
        MissingExtra: ``distributed`` is not installed.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtra("--scheduler needs distributed: pip install distributed") from error
    with Client(address) as client:
        yield client


def inspect_teacher(
    store: KVStore, teacher: str, num_shards: int, plots: Path | None
) -> dict[str, Any]:
    """Summary of one teacher, JSON-ready; largest norms and importance read ``num_shards`` shards.

    With ``plots`` also writes ``plots/TEACHER.png``.
    """
    summary = summarise_teacher(store, teacher)
    read = store.committed_in_order(teacher)[:num_shards]
    histogram = importance_histogram(store, teacher, read)
    report = {
        **asdict(summary),
        "ratio": summary.ratio,
        "largest_norms": {kind: largest_norms(store, teacher, kind, read) for kind in KINDS},
        "shards_read": len(read),
        "importance": None
        if histogram is None
        else {"counts": histogram[0].tolist(), "edges": histogram[1].tolist()},
    }
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        plot_teacher(summary, histogram, plots / f"{teacher}.png")
    return report


def check_store(
    store: KVStore,
    teachers: Sequence[str],
    scheduler: str | None,
    progress: Callable[[str, str], None],
) -> list[Finding]:
    """Check every committed shard; on a distributed scheduler each one is a task of its own."""
    if scheduler is None:
        return verify_store(store, teachers, progress=progress)
    root = store.place.location
    with dask_scheduler(scheduler) as client:
        tasks = [
            client.submit(_check_shard, root, name, shard_id, pure=False)
            for name in teachers
            for shard_id in sorted(store.committed(name))
        ]
        found = client.gather(tasks)
    # Every task checks the corpus too; its findings count once.
    return list(dict.fromkeys(finding for findings in found for finding in findings))


def _check_shard(root: Path | str, teacher: str, shard_id: str) -> list[Finding]:
    return verify_store(KVStore.open(root), [teacher], [shard_id])
