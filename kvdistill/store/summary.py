"""What a person wants to know of a store, as plain data for a table, a plot or a script.

Counts and bytes come from the commits. Norms and outlier channels come from the statistics that
every shard carries, exactly and without reading a key or value. What statistics cannot tell, the
histogram of importance and the largest token norms, is computed with dask over some shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.format import group_prefix
from kvdistill.store.lazy_arrays import committed_in_order, dask_array, dataset
from kvdistill.store.manifest import Commit, TeacherManifest
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
    """One teacher. ``rms`` holds, per kind and layer, the RMS norm of a token for every head."""

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
    extraction_seconds: float
    rms: dict[str, dict[int, list[float]]]
    outliers: list[Outlier]

    @property
    def ratio(self) -> float:
        """Stored bytes, everything included, over the same keys and values in bf16."""
        return self.stored_bytes / self.raw_bytes if self.raw_bytes else 0.0


def summarise_teacher(store: KVStore, teacher: str) -> TeacherSummary:
    """Everything that needs no key or value to be read.

    Raises:
        ShardNotFound: nothing is committed yet.
    """
    manifest = store.teacher(teacher)
    shard_ids = committed_in_order(store, teacher)
    commits = [store.commit(teacher, shard_id) for shard_id in shard_ids]
    by_array = _bytes_by_array(commits)
    statistics = store.statistics(teacher)
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
        rms={kind: _rms_norms(manifest, statistics, kind) for kind in KINDS},
        outliers=_find_outliers(manifest, statistics),
    )


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

    layers = store.teacher(teacher).layers
    lazy = []
    for layer in layers:
        array = dask_array(store, teacher, kind, layer=layer, shard_ids=shard_ids)
        lazy.append(da.sqrt((array**2).sum(axis=-1)).max(axis=-1))
    return {
        layer: [float(x) for x in row]
        for layer, row in zip(layers, dask.compute(*lazy), strict=True)
    }


def _bytes_by_array(commits: Sequence[Commit]) -> dict[str, int]:
    """zarr: bytes of every array. safetensors: of the one file."""
    total: dict[str, int] = {}
    for commit in commits:
        for name, record in commit.files.items():
            array = name.partition("/c/")[0].removesuffix("/zarr.json")
            total[array] = total.get(array, 0) + record.size_bytes
    return total


def _rms(statistics: ChannelStatistics) -> np.ndarray:
    """RMS of every channel, ``[L, H, D]``: the mean square is variance plus squared mean."""
    return np.sqrt(statistics.variance + statistics.mean**2)


def _rms_norms(
    manifest: TeacherManifest, statistics: dict[str, ChannelStatistics], kind: Kind
) -> dict[int, list[float]]:
    norms: dict[int, list[float]] = {}
    for i, group in enumerate(manifest.groups):
        squares = _rms(statistics[f"{group_prefix(manifest, i)}{kind}"]) ** 2
        for layer, row in zip(group.layers, np.sqrt(squares.sum(axis=-1)), strict=True):
            norms[layer] = [float(norm) for norm in row]
    return dict(sorted(norms.items()))


def _find_outliers(
    manifest: TeacherManifest, statistics: dict[str, ChannelStatistics]
) -> list[Outlier]:
    found = []
    for i, group in enumerate(manifest.groups):
        for kind in KINDS:
            rms = _rms(statistics[f"{group_prefix(manifest, i)}{kind}"])
            median = np.median(rms, axis=-1, keepdims=True)
            ratio = np.divide(rms, median, out=np.zeros_like(rms), where=median > 0)
            for layer_idx, head, channel in np.argwhere(ratio >= OUTLIER_RATIO).tolist():
                size = float(ratio[layer_idx, head, channel])
                found.append(Outlier(kind, group.layers[layer_idx], head, channel, size))
    return sorted(found, key=lambda outlier: -outlier.ratio)


def plot_teacher(
    summary: TeacherSummary, histogram: tuple[np.ndarray, np.ndarray] | None, path: Path
) -> None:
    """One PNG for a teacher.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, kind in zip(axes[0], KINDS, strict=True):
        _plot_norms(axis, summary, kind)
    _plot_outliers(axes[1, 0], summary)
    if histogram is None:
        _plot_bytes(axes[1, 1], summary)
    else:
        _plot_importance(axes[1, 1], *histogram)
    figure.suptitle(
        f"{summary.teacher}: {summary.model}, {summary.tokens:,} tokens, "
        f"{summary.ratio:.2f} of bf16"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_norms(axis: Axes, summary: TeacherSummary, kind: str) -> None:
    rows = summary.rms[kind]
    for head in range(max(len(row) for row in rows.values())):
        points = [(layer, row[head]) for layer, row in rows.items() if head < len(row)]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"head {head}")
    axis.set(title=f"{kind}: RMS norm of a token", xlabel="layer", yscale="log")
    if len(axis.lines) <= 8:
        axis.legend(fontsize="small")


def _plot_outliers(axis: Axes, summary: TeacherSummary) -> None:
    for kind in KINDS:
        found = [outlier for outlier in summary.outliers if outlier.kind == kind]
        axis.scatter([o.layer for o in found], [o.ratio for o in found], s=12, label=kind)
    axis.set(title="outlier channels", xlabel="layer", ylabel="RMS over the median channel's")
    axis.legend(fontsize="small")


def _plot_bytes(axis: Axes, summary: TeacherSummary) -> None:
    largest = sorted(summary.bytes_by_array.items(), key=lambda item: -item[1])[:8]
    axis.barh([name for name, _ in largest], [size / 1e6 for _, size in largest])
    axis.invert_yaxis()
    axis.set(title="stored", xlabel="MB")


def _plot_importance(axis: Axes, counts: np.ndarray, edges: np.ndarray) -> None:
    axis.stairs(counts / max(int(counts.sum()), 1), edges, fill=True)
    axis.set(title="importance", xlabel="attention received", ylabel="share", xscale="log")


# MERGED-DOC store.plots
# Pictures of a store: norms by layer and head, outlier channels, bytes, importance.
