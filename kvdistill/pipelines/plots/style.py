"""One look for every figure, and figures that follow their page's light or dark theme.

A figure is drawn with three inks (text, quiet text, rules). In a PNG they are what they are; in
an SVG that is put into a page they become CSS variables, so the page decides. Series have the
colours of Okabe and Ito, which stay apart for colour-blind readers and on both themes; where
colours run out, markers change. Text stays text: small, sharp on any screen, and searchable.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import Final

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

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
