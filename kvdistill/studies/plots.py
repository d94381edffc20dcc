"""Every figure in one style, as PNG or as SVG that follows its page's light or dark theme.

A figure is drawn with three inks (text, secondary text, rules). A PNG keeps them; an SVG in a page
replaces them by CSS variables of the page's theme. Series have the colour-blind-safe palette of
Okabe and Ito, which contrasts with both themes, and differ in their markers too. SVG text
stays text: small, sharp at any size, and searchable.
"""

from __future__ import annotations

import io
import re
import textwrap
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

from kvdistill.studies.statistics import Estimate

Points = tuple[Sequence[float], Sequence[float]]
"""x and y of one curve."""
ByName = Mapping[str, Sequence[float]]
Looks = Mapping[str, "Look"]

INK: Final = "#1c2733"
QUIET: Final = "#5b6873"
RULE: Final = "#d6dce2"
VARIABLES: Final = {INK: "var(--ink)", QUIET: "var(--quiet)", RULE: "var(--rule)"}
PALETTE: Final = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31")
MARKERS: Final = {
    "o": "M9 6a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "^": "M14 1l5 10H9z",
    "D": "M14 0l6 6-6 6-6-6z",
    "v": "M14 11l5-10H9z",
    "s": "M9 1h10v10H9z",
}
"""Each marker as an SVG path, around the middle of 28 by 12."""
# From transparent to blue, so that zero has the colour of the page in either theme.
SHADES: Final = LinearSegmentedColormap.from_list(
    "shades", [(0, 0.447, 0.698, 0), (0, 0.447, 0.698, 1)]
)
WIDEST_ON_A_PHONE: Final = 480
"""Pixels. A figure wider than this, such as an alignment's tokens, scrolls and does not shrink."""
WIDTH: Final = 4.4
"""Inches. At 9 points the text is still readable when a phone shrinks the figure to 340 pixels."""
NUM_MARKERS: Final = 12
"""Of a curve of many points, about so many have a marker."""
MANY_CURVES: Final = 6
"""More curves than this have no bands, which would hide one another."""

mpl.rc("font", size=9)
mpl.rc("text", color=INK)
mpl.rc("axes", titlesize=9.5, titlelocation="left", titleweight="bold", titlecolor=INK)
mpl.rc("axes", labelcolor=INK, edgecolor=QUIET, facecolor="none", prop_cycle=cycler(color=PALETTE))
mpl.rc("axes", grid=True, axisbelow=True)
mpl.rc("axes.spines", top=False, right=False)
mpl.rc("grid", color=RULE, linewidth=0.6)
mpl.rc(("xtick", "ytick"), color=QUIET, labelcolor=INK)
mpl.rc("legend", frameon=False, fontsize=8)
mpl.rc("figure", facecolor="white")
mpl.rc("svg", fonttype="none", hashsalt="kvdistill")


@dataclass(frozen=True)
class Look:
    """How one series is drawn in every figure."""

    color: str
    marker: str = "o"
    line: str = "-"


def look(idx: int, *, baseline: bool = False, placebo: bool = False) -> Look:
    """The look of the idx-th series: the baseline in ink, placebos dashed."""
    if baseline:
        return Look(INK, "s")
    marker = [*MARKERS][idx % len(MARKERS)]
    return Look(PALETTE[idx % len(PALETTE)], marker, "--" if placebo else "-")


def swatch(style: Look) -> str:
    """Line and marker of a series as an ``<svg>`` for a legend, in the theme of its page."""
    color = VARIABLES.get(style.color, style.color)
    dashes = "" if style.line == "-" else ' stroke-dasharray="5 3"'
    return (
        f'<svg aria-hidden="true" class="swatch" viewBox="0 0 28 12" fill="{color}">'
        f'<path d="M0 6h28" stroke="{color}" stroke-width="2"{dashes}/>'
        f'<path d="{MARKERS[style.marker]}"/></svg>'
    )


def canvas(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes = figure.subplots()
    return figure, axes


def legend_below(figure: Figure, columns: int = 2) -> None:
    """A legend under the axes, which covers no data however many series there are."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)))


def svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element that takes the theme of its page.

    Args:
        figure: the figure.
        name: unique in the page; prefix of all identifiers inside.
        label: text for screen readers.
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


def bands(
    series: Mapping[str, Sequence[Points]],
    looks: Looks,
    y_label: str,
    title: str,
    *,
    legend: bool = False,
) -> Figure:
    """Mean over seeds of each arm's curves, in a band from the lowest seed to the highest."""
    figure, axes = canvas(3.0)
    for name, curves in series.items():
        steps = sorted(set.intersection(*(set(x) for x, _ in curves)))
        points = [dict(zip(*curve, strict=True)) for curve in curves]
        values = np.array([[by_step[step] for step in steps] for by_step in points])
        values = values.reshape(len(curves), len(steps))
        _line(axes, (steps, list(values.mean(0))), name, looks[name])
        if len(curves) > 1 and len(series) <= MANY_CURVES:
            axes.fill_between(
                steps, values.min(0), values.max(0), color=looks[name].color, alpha=0.18, lw=0
            )
    axes.set(xlabel="optimizer step", ylabel=y_label, title=title)
    if legend:
        legend_below(figure)
    return figure


def forest(
    estimates: Mapping[str, Estimate], looks: Looks, x_label: str, title: str, scale: float = 1.0
) -> Figure:
    """One row per arm: its change against the baseline, times ``scale``, and the 95 % interval."""
    figure, axes = _rows(list(estimates), x_label, title)
    for row, (name, estimate) in enumerate(estimates.items()):
        style = looks[name]
        if estimate.interval is not None:
            axes.plot(
                [scale * estimate.interval.low, scale * estimate.interval.high], [row, row],
                color=style.color, lw=2, ls=style.line,
            )  # fmt: skip
        axes.plot(scale * estimate.value, row, style.marker, color=style.color, markersize=6)
    axes.axvline(0, color=INK, lw=0.9)
    return figure


def dots(values: ByName, looks: Looks, x_label: str, title: str) -> Figure:
    """One dot per run and one row per arm, a bar at each mean."""
    figure, axes = _rows(list(values), x_label, title)
    for row, (name, found) in enumerate(values.items()):
        style = looks[name]
        axes.plot(found, [row] * len(found), style.marker, color=style.color, ms=5, alpha=0.65)
        axes.plot([np.mean(found)] * 2, [row - 0.3, row + 0.3], color=style.color, lw=1.6)
    return figure


def reliability(series: Mapping[str, Points], looks: Looks) -> Figure:
    """Accuracy over confidence, one line per arm; the diagonal is perfect calibration."""
    figure, axes = canvas(3.2)
    axes.plot([0, 1], [0, 1], color=QUIET, lw=0.9, ls=":")
    for name, points in series.items():
        _line(axes, points, name, looks[name])
    axes.set(xlabel="confidence", ylabel="accuracy", title="Reliability")
    return figure


def over_layers(
    series: ByName,
    y_label: str,
    title: str,
    *,
    looks: Looks | None = None,
    reference: float | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """One line per series over the student's layers; without ``looks`` with a legend."""
    figure, axes = canvas(3.0)
    for idx, (name, values) in enumerate(series.items()):
        style = look(idx) if looks is None else looks[name]
        _line(axes, (range(len(values)), values), name, style)
    if reference is not None:
        axes.axhline(reference, color=QUIET, lw=0.8, ls=":")
    axes.set(xlabel="student layer", ylabel=y_label, title=title)
    axes.set_ylim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if looks is None:
        legend_below(figure)
    return figure


def weights_by_task(tasks: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars: each teacher's fusion weight, by task."""
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
    """Singular values of the projectors, largest first; a steep fall means low rank."""
    figure, axes = canvas(3.2)
    for name, singular in values.items():
        axes.plot(np.arange(1, len(singular) + 1), singular, lw=1.4, label=name)
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
    axes.set(xlabel=f"{teacher} tokens", ylabel="student tokens", title=f"Alignment: {teacher}")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, fraction=0.025, label="weight")
    return figure


def _line(axes: Axes, points: Points, name: str, style: Look) -> None:
    axes.plot(
        *points, label=name, color=style.color, ls=style.line, lw=1.4, marker=style.marker,
        markersize=4, markevery=max(1, len(points[0]) // NUM_MARKERS),
    )  # fmt: skip


def _rows(names: Sequence[str], x_label: str, title: str) -> tuple[Figure, Axes]:
    """An empty figure with one row per name, the first on top."""
    figure, axes = canvas(1.1 + 0.28 * len(names))
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 26) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlabel=x_label, title=title)
    return figure, axes


def _visible_text(token: str) -> str:
    """A token with visible white space, and ``$`` escaped so that matplotlib sets no formula."""
    return token.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") or "∅"
