"""The report's figures, each from plain data to a PNG that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

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

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Curves by name: x and y."""


def data_uri(figure: Figure, dpi: int = 130) -> str:
    """A figure as a ``data:`` address, so that a page needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(series: Series, y_label: str, title: str) -> Figure:
    """Lines over optimizer steps; a dot for every point where there are few."""
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.subplots()
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=3, lw=1.4)
    axes.set(xlabel="optimizer step", ylabel=y_label, title=title)
    axes.legend(frameon=False)
    return figure


def layer_map(depths: Mapping[str, Sequence[float]]) -> Figure:
    """Which (real-valued) teacher layer each student layer is compared with."""
    figure = Figure(figsize=(5.6, 3.0))
    axes = figure.subplots()
    for name, layers in depths.items():
        axes.plot(range(len(layers)), layers, marker="o", markersize=4, lw=1, label=name)
    axes.set(xlabel="student layer", ylabel="teacher layer", title="Layer map (between two: a mix)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
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


def error_by_layer(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Mean squared error of keys and values against the standardised target, by student layer."""
    figure = Figure(figsize=(5.6, 3.0))
    axes = figure.subplots()
    for run, kinds in errors.items():
        for kind, values in kinds.items():
            style = "-" if kind == "key" else "--"
            axes.plot(range(len(values)), values, style, marker="o", ms=4, label=f"{run}: {kind}")
    axes.axhline(1.0, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="student layer", ylabel="error (1 = the mean)", title="KV error by layer")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return figure


def _shown(token: str) -> str:
    """A token's text with its white space visible; matplotlib must not read it as mathematics."""
    return token.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") or "∅"
