"""A run's figures, each from plain data to a matplotlib figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlesize": 10,
        "savefig.bbox": "tight",
    }
)

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Curves by name: x and y."""
ByName = Mapping[str, Sequence[float]]


def data_uri(figure: Figure, dpi: int = 130) -> str:
    """A figure as a ``data:`` address, so that a page needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(series: Curves, y_label: str, title: str) -> Figure:
    """Lines over optimizer steps; a dot for every point where there are few."""
    figure, axes = _canvas(3.4)
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=3, lw=1.4)
    axes.set(xlabel="optimizer step", ylabel=y_label, title=title)
    axes.legend(frameon=False)
    return figure


def layer_map(depths: ByName) -> Figure:
    """Which (real-valued) teacher layer each student layer is compared with."""
    return _over_layers(depths, "teacher layer", "Layer map (between two: a mix)")


def error_by_layer(kinds: ByName) -> Figure:
    """Mean squared error of keys and values against the target, by student layer."""
    figure = _over_layers(kinds, "error (1 = the mean)", "KV error by layer")
    figure.axes[0].axhline(1.0, color="grey", lw=0.8, ls=":")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def weights_by_layer(teachers: ByName) -> Figure:
    """Fusion weight of each teacher, by student layer."""
    figure = _over_layers(teachers, "fusion weight", "Fusion weights by layer")
    figure.axes[0].set_ylim(0, 1)
    return figure


def weights_by_task(tasks: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars: each teacher's share, by task."""
    figure, axes = _canvas(3.0)
    names = [task or "no task" for task in tasks]
    bottom = np.zeros(len(names))
    for teacher in next(iter(tasks.values())):
        shares = np.array([weights[teacher] for weights in tasks.values()])
        axes.bar(names, shares, bottom=bottom, label=teacher)
        bottom += shares
    axes.set(ylabel="fusion weight", title="Fusion weights by task", ylim=(0, 1))
    axes.legend(frameon=False)
    return figure


def spectra(values: ByName) -> Figure:
    """Singular values of the projectors, largest first; a steep fall is a map of low rank."""
    figure, axes = _canvas(3.4)
    for name, singular in values.items():
        axes.plot(np.arange(1, len(singular) + 1), singular, lw=1.2, label=name)
    axes.set(xlabel="index", ylabel="singular value", title="Projector spectra", yscale="log")
    axes.legend(frameon=False, fontsize=7)
    return figure


def alignment(example: Mapping[str, Any], teacher: str) -> Figure:
    """Weights of teacher tokens (columns) for student tokens (rows), with both token strings."""
    weights = np.asarray(example["weights"])
    rows = [_shown(token) for token in example["student_tokens"]]
    columns = [_shown(token) for token in example["teacher_tokens"]]
    figure = Figure(figsize=(1.6 + 0.19 * len(columns), 1.2 + 0.19 * len(rows)))
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
    axes.set_yticks(range(len(rows)), rows, fontsize=6)
    axes.set(xlabel=f"{teacher}'s tokens", ylabel="student's tokens", title=f"Alignment: {teacher}")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, fraction=0.025, label="weight")
    return figure


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, height))
    axes: Axes = figure.subplots()
    return figure, axes


def _over_layers(series: ByName, y_label: str, title: str) -> Figure:
    figure, axes = _canvas(3.0)
    for name, values in series.items():
        axes.plot(range(len(values)), values, marker="o", markersize=4, lw=1, label=name)
    axes.set(xlabel="student layer", ylabel=y_label, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def _shown(token: str) -> str:
    """A token's text with its white space visible; matplotlib must not read it as mathematics."""
    return token.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") or "∅"
