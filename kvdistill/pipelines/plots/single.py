"""Figures of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvdistill.pipelines.plots.style import QUIET, SHADES, canvas, legend_below

ByName = Mapping[str, Sequence[float]]


def layer_map(depths: ByName) -> Figure:
    """Which (real-valued) teacher layer each student layer is compared with."""
    return _over_layers(depths, "teacher layer", "Layer map (between two: a mix)")


def error_by_layer(kinds: ByName) -> Figure:
    """Mean squared error of keys and values against the target, by student layer."""
    figure = _over_layers(kinds, "error (1 = the mean)", "KV error by layer")
    figure.axes[0].axhline(1.0, color=QUIET, lw=0.8, ls=":")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def weights_by_layer(teachers: ByName) -> Figure:
    """Fusion weight of each teacher, by student layer."""
    figure = _over_layers(teachers, "fusion weight", "Fusion weights by layer")
    figure.axes[0].set_ylim(0, 1)
    return figure


def weights_by_task(tasks: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars: each teacher's share, by task."""
    figure, axes = canvas(3.0)
    names = [task or "no task" for task in tasks]
    bottom = np.zeros(len(names))
    for teacher in next(iter(tasks.values())):
        shares = np.array([weights[teacher] for weights in tasks.values()])
        axes.bar(names, shares, bottom=bottom, label=teacher)
        bottom += shares
    axes.set(ylabel="fusion weight", title="Fusion weights by task", ylim=(0, 1))
    legend_below(figure)
    return figure


def spectra(values: ByName) -> Figure:
    """Singular values of the projectors, largest first; a steep fall is a map of low rank."""
    figure, axes = canvas(3.2)
    for name, singular in values.items():
        axes.plot(np.arange(1, len(singular) + 1), singular, lw=1.2, label=name)
    axes.set(xlabel="index", ylabel="singular value", title="Projector spectra", yscale="log")
    legend_below(figure)
    return figure


def alignment(example: Mapping[str, Any], teacher: str) -> Figure:
    """Weights of teacher tokens (columns) for student tokens (rows), with both token strings."""
    weights = np.asarray(example["weights"])
    rows = [_shown(token) for token in example["student_tokens"]]
    columns = [_shown(token) for token in example["teacher_tokens"]]
    figure, axes = canvas(1.2 + 0.19 * len(rows), 1.6 + 0.19 * len(columns))
    image = axes.imshow(weights, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
    axes.set_yticks(range(len(rows)), rows, fontsize=6)
    axes.set(xlabel=f"{teacher}'s tokens", ylabel="student's tokens", title=f"Alignment: {teacher}")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, fraction=0.025, label="weight")
    return figure


def _over_layers(series: ByName, y_label: str, title: str) -> Figure:
    figure, axes = canvas(3.0)
    for name, values in series.items():
        axes.plot(range(len(values)), values, marker="o", markersize=4, lw=1, label=name)
    axes.set(xlabel="student layer", ylabel=y_label, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure)
    return figure


def _shown(token: str) -> str:
    """A token's text with its white space visible; matplotlib must not read it as mathematics."""
    return token.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") or "∅"
