"""One look for every figure, and figures that follow their page's light or dark theme.

A figure is drawn with three inks (text, quiet text, rules). In a PNG they are what they are; in
an SVG that is put into a page they become CSS variables, so the page decides. Series have the
colours of Okabe and Ito, which stay apart for colour-blind readers and on both themes; where
colours run out, markers change. Text stays text: small, sharp on any screen, and searchable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK: Final = "#1c2733"


QUIET: Final = "#5b6873"


RULE: Final = "#d6dce2"


VARIABLES: Final = {INK: "var(--ink)", QUIET: "var(--quiet)", RULE: "var(--rule)"}


PALETTE: Final = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31")


MARKERS: Final = "os^Dv"


# From nothing to blue, not from white: nothing is white on a light page and dark on a dark one.
SHADES: Final = LinearSegmentedColormap.from_list(
    "shades", [(0, 0.447, 0.698, 0), (0, 0.447, 0.698, 1)]
)


WIDEST_ON_A_PHONE: Final = 480
"""Pixels. A figure wider than this, such as an alignment's tokens, scrolls and does not shrink."""


WIDTH: Final = 4.4
"""Inches. At 9 points the text is still readable when a phone shrinks the figure to 340 pixels."""


mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.edgecolor": QUIET,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.facecolor": "none",
        "figure.facecolor": "white",
        "svg.fonttype": "none",
        "svg.hashsalt": "kvdistill",
    }
)


@dataclass(frozen=True)
class Look:
    """How one series is drawn wherever it appears."""

    color: str
    marker: str = "o"
    line: str = "-"


def look(idx: int, *, baseline: bool = False, placebo: bool = False) -> Look:
    """The look of the idx-th series: the baseline in ink, placebos dashed."""
    if baseline:
        return Look(INK, "s")
    marker = MARKERS[idx // len(PALETTE) % len(MARKERS)]
    return Look(PALETTE[idx % len(PALETTE)], marker, "--" if placebo else "-")


def canvas(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes = figure.subplots()
    return figure, axes


def legend_below(figure: Figure, columns: int = 2) -> None:
    """A legend under the axes, where it hides nothing however many series there are."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)))


def svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element for a page: themed by it, labelled.

    Args:
        figure: what was drawn.
        name: unique in the page; the identifiers inside begin with it.
        label: what a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    name = re.sub(r"[^\w-]", "-", name)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    width = float(re.findall(r'width="([\d.]+)pt"', text)[0])
    text = re.sub(r'(width|height)="[\d.]+pt" ', "", text, count=2)
    # matplotlib's paths carry six decimals; a hundredth of a point is finer than any screen.
    text = re.sub(r'\sd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    pixels = width * 4 / 3
    size = f"max-width:{pixels:.0f}px"
    if pixels > WIDEST_ON_A_PHONE:
        size += f";min-width:{pixels:.0f}px"
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" style="{size}"', 1)


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


ByName = Mapping[str, Sequence[float]]


def layer_map_lines(depths: ByName) -> Figure:
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
    rows = [_visible_text(token) for token in example["student_tokens"]]
    columns = [_visible_text(token) for token in example["teacher_tokens"]]
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


def _visible_text(token: str) -> str:
    """A token's text with its white space visible; matplotlib must not read it as mathematics."""
    return token.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") or "∅"


# MERGED-DOC pipelines.plots.arms
# Figures that compare arms, each over its seeds.


# MERGED-DOC pipelines.plots.single
# Figures of one run.
