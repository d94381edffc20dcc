"""Pictures of a store: norms by layer and head, outlier channels, bytes, importance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvdistill.store.summary import TeacherSummary
from kvdistill.types import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        _norms(axis, summary, kind)
    _outliers(axes[1, 0], summary)
    if histogram is None:
        _bytes(axes[1, 1], summary)
    else:
        _importance(axes[1, 1], *histogram)
    figure.suptitle(
        f"{summary.teacher}: {summary.model}, {summary.tokens:,} tokens, "
        f"{summary.ratio:.2f} of bf16"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _norms(axis: Axes, summary: TeacherSummary, kind: str) -> None:
    rows = summary.rms[kind]
    for head in range(max(len(row) for row in rows.values())):
        points = [(layer, row[head]) for layer, row in rows.items() if head < len(row)]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"head {head}")
    axis.set(title=f"{kind}: RMS norm of a token", xlabel="layer", yscale="log")
    if len(axis.lines) <= 8:
        axis.legend(fontsize="small")


def _outliers(axis: Axes, summary: TeacherSummary) -> None:
    for kind in KINDS:
        found = [outlier for outlier in summary.outliers if outlier.kind == kind]
        axis.scatter([o.layer for o in found], [o.ratio for o in found], s=12, label=kind)
    axis.set(title="outlier channels", xlabel="layer", ylabel="RMS over the median channel's")
    axis.legend(fontsize="small")


def _bytes(axis: Axes, summary: TeacherSummary) -> None:
    largest = sorted(summary.bytes_by_array.items(), key=lambda item: -item[1])[:8]
    axis.barh([name for name, _ in largest], [size / 1e6 for _, size in largest])
    axis.invert_yaxis()
    axis.set(title="stored", xlabel="MB")


def _importance(axis: Axes, counts: np.ndarray, edges: np.ndarray) -> None:
    axis.stairs(counts / max(int(counts.sum()), 1), edges, fill=True)
    axis.set(title="importance", xlabel="attention received", ylabel="share", xscale="log")
