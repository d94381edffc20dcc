"""Figures that compare arms, each over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvdistill.pipelines.plots.style import INK, QUIET, RULE, Look, canvas, legend_below

Points = tuple[Sequence[float], Sequence[float]]
"""Steps and values of one curve."""
FEW_POINTS = 30


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; ``low`` and ``high`` are None where one run is all there is."""

    value: float
    low: float | None = None
    high: float | None = None


def bands(
    series: Mapping[str, Sequence[Points]], looks: Mapping[str, Look], y_label: str, title: str
) -> Figure:
    """Each arm's mean over its seeds, in a band from the lowest seed to the highest."""
    figure, axes = canvas(3.2)
    for name, curves in series.items():
        x, low, mean, high = _over_seeds(curves)
        style = looks[name]
        axes.plot(
            x, mean, label=name, color=style.color, ls=style.line, lw=1.4,
            marker=style.marker if len(x) < FEW_POINTS else None, markersize=3,
        )  # fmt: skip
        if len(curves) > 1:
            axes.fill_between(x, low, high, color=style.color, alpha=0.18, lw=0)
    axes.set(xlabel="optimizer step", ylabel=y_label, title=title)
    legend_below(figure)
    return figure


def forest(
    estimates: Mapping[str, Estimate],
    looks: Mapping[str, Look],
    x_label: str,
    title: str,
    *,
    percent: bool = False,
) -> Figure:
    """One line per arm: its change against the baseline and the 95 % interval; 0 is no change."""
    figure, axes = canvas(1.1 + 0.28 * len(estimates))
    for row, (name, estimate) in enumerate(estimates.items()):
        style, scale = looks[name], 100 if percent else 1
        if estimate.low is not None and estimate.high is not None:
            axes.plot(
                [scale * estimate.low, scale * estimate.high], [row, row],
                color=style.color, lw=2, ls=style.line,
            )  # fmt: skip
        axes.plot(scale * estimate.value, row, style.marker, color=style.color, markersize=6)
    axes.axvline(0, color=INK, lw=0.9)
    _name_rows(axes, list(estimates))
    axes.set(xlabel=x_label, title=title)
    return figure


def dots(
    values: Mapping[str, Sequence[float]], looks: Mapping[str, Look], x_label: str, title: str
) -> Figure:
    """One dot per run and one row per arm, a bar at each mean: the results without statistics."""
    figure, axes = canvas(1.1 + 0.28 * len(values))
    for row, (name, found) in enumerate(values.items()):
        style = looks[name]
        axes.plot(found, [row] * len(found), style.marker, color=style.color, ms=5, alpha=0.65)
        axes.plot([np.mean(found)] * 2, [row - 0.3, row + 0.3], color=style.color, lw=1.6)
    _name_rows(axes, list(values))
    axes.set(xlabel=x_label, title=title)
    return figure


def bars(
    values: Mapping[str, Sequence[float]], looks: Mapping[str, Look], x_label: str, title: str
) -> Figure:
    """Lying bars from zero: each arm's mean, with a line from its lowest run to its highest."""
    figure, axes = canvas(1.1 + 0.28 * len(values))
    for row, (name, found) in enumerate(values.items()):
        style = looks[name]
        hatch = "////" if style.line != "-" else None
        axes.barh(row, np.mean(found), 0.62, color=style.color, alpha=0.8, hatch=hatch, ec=RULE)
        if len(found) > 1:
            axes.plot([min(found), max(found)], [row, row], color=INK, lw=1.4)
    axes.axvline(0, color=QUIET, lw=0.8)
    _name_rows(axes, list(values))
    axes.set(xlabel=x_label, title=title)
    return figure


def reliability(series: Mapping[str, Points], looks: Mapping[str, Look]) -> Figure:
    """Accuracy over confidence, one line per arm; on the diagonal, both are the same."""
    figure, axes = canvas(3.2)
    axes.plot([0, 1], [0, 1], color=QUIET, lw=0.9, ls=":")
    for name, (confidence, accuracy) in series.items():
        style = looks[name]
        axes.plot(
            confidence, accuracy, label=name, color=style.color, ls=style.line,
            marker=style.marker, markersize=3, lw=1.2,
        )  # fmt: skip
    axes.set(xlabel="how sure", ylabel="how often right", title="Reliability")
    legend_below(figure)
    return figure


def by_layer(
    series: Mapping[str, Sequence[float]], looks: Mapping[str, Look], y_label: str, title: str
) -> Figure:
    """One line per arm over the student's layers."""
    figure, axes = canvas(3.0)
    for name, values in series.items():
        style = looks[name]
        axes.plot(
            range(len(values)), values, label=name, color=style.color, ls=style.line,
            marker=style.marker, markersize=4, lw=1.2,
        )  # fmt: skip
    axes.set(xlabel="student layer", ylabel=y_label, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure)
    return figure


def _over_seeds(curves: Sequence[Points]) -> tuple[list[float], ...]:
    """Steps that every curve has, and lowest, mean and highest value there."""
    steps = sorted(set.intersection(*(set(x) for x, _ in curves)))
    values = np.array(
        [[dict(zip(*curve, strict=True))[step] for step in steps] for curve in curves]
    )
    values = values.reshape(len(curves), len(steps))
    return steps, list(values.min(0)), list(values.mean(0)), list(values.max(0))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names as tick labels, the first on top, and no rules between them."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
