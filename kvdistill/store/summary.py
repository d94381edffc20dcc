"""Summary of a store for tables, plots and scripts: sizes, norms, outlier channels, importance.

Counts and sizes come from the commits. Norms and outlier channels come from the statistics that
every shard carries: exact, without reading a key or value. The histogram of importance and the
largest token norms need the arrays themselves, and are computed by dask over some or all shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.confidence import nats_per_character
from kvdistill.store.format import group_prefix
from kvdistill.store.lazy_arrays import dask_array, dataset
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTLIER_RATIO: Final = 5.0
"""A channel is an outlier if its RMS is this many times the median of its layer and head."""

IMPORTANCE_BINS: Final = np.logspace(-8, 0, 33)


@dataclass(frozen=True)
class Outlier:
    """A channel far larger than its neighbours."""

    kind: Kind
    layer: int
    head: int
    channel: int
    ratio: float
    """Its RMS over the median RMS of its layer and head."""


@dataclass(frozen=True)
class TeacherSummary:
    """One teacher. ``rms`` is the RMS norm of a token, per kind and layer, of every head."""

    teacher: str
    model: str
    backend: str
    codec: dict[str, str]
    layers: int
    key_value_heads: list[int]
    shards: int
    planned_shards: int
    samples: int
    tokens: int
    stored_bytes: int
    raw_bytes: int
    bytes_by_array: dict[str, int]
    """zarr: of every array. safetensors: of the one file."""
    extraction_seconds: float
    nats_per_character: dict[str, float]
    """Of all texts and by task; empty without confidence."""
    rms: dict[str, dict[int, list[float]]]
    outliers: list[Outlier]

    @property
    def ratio(self) -> float:
        """Stored bytes, everything included, over the same keys and values in bf16."""
        return self.stored_bytes / self.raw_bytes if self.raw_bytes else 0.0


def summarise_teacher(store: KVStore, teacher: str) -> TeacherSummary:
    """Everything that needs no key or value to be read, but all token tables for confidence.

    Raises:
        ShardNotFound: nothing is committed yet.
    """
    manifest = store.teacher(teacher)
    shard_ids = store.committed_in_order(teacher)
    commits = [store.commit(teacher, shard_id) for shard_id in shard_ids]
    by_array: dict[str, int] = {}
    for name, record in (item for commit in commits for item in commit.files.items()):
        array = name.partition("/c/")[0].removesuffix("/zarr.json")
        by_array[array] = by_array.get(array, 0) + record.size_bytes
    statistics = store.statistics(teacher)
    rms = {kind: _channel_rms(manifest, statistics, kind) for kind in KINDS}
    outliers = []
    for kind, by_layer in rms.items():
        for layer, rms_HD in by_layer.items():
            median = np.median(rms_HD, axis=-1, keepdims=True)
            ratio = np.divide(rms_HD, median, out=np.zeros_like(rms_HD), where=median > 0)
            for head, channel in np.argwhere(ratio >= OUTLIER_RATIO).tolist():
                outliers.append(Outlier(kind, layer, head, channel, float(ratio[head, channel])))
    return TeacherSummary(
        teacher=teacher,
        model=manifest.model,
        backend=manifest.backend,
        codec=manifest.codec.model_dump(),
        layers=len(manifest.layers),
        key_value_heads=sorted({group.num_key_value_heads for group in manifest.groups}),
        shards=len(commits),
        planned_shards=len(store.shard_ids),
        samples=sum(commit.num_samples for commit in commits),
        tokens=sum(commit.num_tokens for commit in commits),
        stored_bytes=sum(by_array.values()),
        raw_bytes=sum(commit.raw_bytes for commit in commits),
        bytes_by_array=by_array,
        extraction_seconds=sum(commit.seconds for commit in commits),
        nats_per_character=nats_per_character(store, teacher),
        rms={
            kind: {layer: np.sqrt((x**2).sum(axis=-1)).tolist() for layer, x in by_layer.items()}
            for kind, by_layer in rms.items()
        },
        outliers=sorted(outliers, key=lambda outlier: -outlier.ratio),
    )


def _channel_rms(
    manifest: TeacherManifest, statistics: Mapping[str, ChannelStatistics], kind: Kind
) -> dict[int, np.ndarray]:
    """RMS of every channel, ``[H, D]`` by layer: the mean square is variance plus squared mean."""
    rms: dict[int, np.ndarray] = {}
    for i, group in enumerate(manifest.groups):
        found = statistics[f"{group_prefix(manifest, i)}{kind}"]
        rms |= zip(group.layers, np.sqrt(found.variance + found.mean**2), strict=True)
    return dict(sorted(rms.items()))


def importance_histogram(
    store: KVStore, teacher: str, shard_ids: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts and bin edges of importance, by dask; None where the teacher has none.

    Zero, the importance of every token outside the rationale, is not counted.
    """
    import dask.array as da

    manifest = store.teacher(teacher)
    if not manifest.has_importance:
        return None
    counts = np.zeros(len(IMPORTANCE_BINS) - 1, np.int64)
    for group in manifest.groups:
        array = dataset(store, teacher, layers=group.layers, shard_ids=shard_ids)["importance"]
        counts += da.histogram(array.data, bins=IMPORTANCE_BINS)[0].compute()
    return counts, IMPORTANCE_BINS


def largest_norms(
    store: KVStore, teacher: str, kind: Kind, shard_ids: Sequence[str] | None = None
) -> dict[int, list[float]]:
    """Largest token norm per layer and head, by dask: decodes the shards named, or all."""
    import dask
    import dask.array as da

    lazy = {}
    for layer in store.teacher(teacher).layers:
        array = dask_array(store, teacher, kind, layer=layer, shard_ids=shard_ids)
        norms = da.sqrt((array**2).sum(axis=-1))
        lazy[layer] = norms.max(axis=-1) if norms.shape[-1] else np.zeros(len(norms))
    (largest,) = dask.compute(lazy)
    return {layer: norms.tolist() for layer, norms in largest.items()}


def plot_teacher(
    summary: TeacherSummary, histogram: tuple[np.ndarray, np.ndarray] | None, path: Path
) -> None:
    """Write one PNG: norms by layer and head, outlier channels, and importance or sizes.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, kind in zip(axes[0], KINDS, strict=True):
        _plot_norms(axis, summary, kind)
    left, right = axes[1]
    for kind in KINDS:
        found = [outlier for outlier in summary.outliers if outlier.kind == kind]
        left.scatter([o.layer for o in found], [o.ratio for o in found], s=12, label=kind)
    left.set(title="outlier channels", xlabel="layer", ylabel="RMS over the median channel's")
    left.legend(fontsize="small")
    if histogram is None:
        largest = sorted(summary.bytes_by_array.items(), key=lambda item: -item[1])[:8]
        right.barh([name for name, _ in largest], [size / 1e6 for _, size in largest])
        right.invert_yaxis()
        right.set(title="stored", xlabel="MB")
    else:
        counts, edges = histogram
        right.stairs(counts / max(int(counts.sum()), 1), edges, fill=True)
        right.set(title="importance", xlabel="attention received", ylabel="share", xscale="log")
    figure.suptitle(
        f"{summary.teacher}: {summary.model}, {summary.tokens:,} tokens, "
        f"{summary.ratio:.2f} of bf16"
    )
    figure.savefig(path, dpi=120)


def _plot_norms(axis: Axes, summary: TeacherSummary, kind: str) -> None:
    rows = summary.rms[kind]
    for head in range(max(len(row) for row in rows.values())):
        points = [(layer, row[head]) for layer, row in rows.items() if head < len(row)]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"head {head}")
    scale = "log" if any(map(any, rows.values())) else "linear"
    axis.set(title=f"{kind}: RMS norm of a token", xlabel="layer", yscale=scale)
    if len(axis.lines) <= 8:
        axis.legend(fontsize="small")
