"""Every figure of a report, each with a caption that can be read without the code.

A study gets the figures that its runs have data for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from kvdistill.studies import plots
from kvdistill.studies.plots import Look, look
from kvdistill.studies.report.comparison import (
    BITS,
    LOG_PERPLEXITY,
    against,
    left_out,
    paired,
    relative,
)
from kvdistill.studies.report.reading import Arm, Run, Study
from kvdistill.studies.report.results import Row
from kvdistill.types import PLURALS

CURVES: Final = {
    "eval_bits_per_character": (
        "Held-out text",
        "bits per character",
        "Bits per character on held-out text during training; lower is better, independent of the "
        "tokenizer.",
    ),
    "loss_cross_entropy": (
        "Training: cross-entropy",
        "nats per token",
        "Next-token loss on the training text, which every arm is trained on. A curve that is "
        "lower here but not on held-out text shows overfitting.",
    ),
    "loss_key": (
        "Training: key loss",
        "error (1 = the mean)",
        "Error of the students' attention keys against their target, before weighting; predicting "
        "the mean scores 1. A loss that falls to zero is suspicious: a trainable target may have "
        "collapsed onto the student.",
    ),
    "loss_value": (
        "Training: value loss",
        "error (1 = the mean)",
        "Error of the students' attention values against their target, before weighting; "
        "predicting the mean scores 1.",
    ),
}
CALIBRATION_BINS: Final = 15


@dataclass(frozen=True)
class ReportFigure:
    """A figure, its caption, and the runs whose data it shows."""

    name: str
    """Unique in a report, and fit for a file name."""
    caption: str
    figure: Figure
    runs: tuple[Run, ...]


def arm_looks(study: Study) -> dict[str, Look]:
    """How each arm is drawn, by label, in the order of the arms."""
    others = [arm.label for arm in study.arms if arm.name != study.baseline]
    return {
        arm.label: look(0, baseline=True)
        if arm.name == study.baseline
        else look(others.index(arm.label), placebo=arm.placebo)
        for arm in study.arms
    }


def headline_figure(study: Study, rows: Sequence[Row]) -> ReportFigure | None:
    """The first figure: every arm's change, or else a curve; None of runs that logged nothing."""
    looks = arm_looks(study)
    return _changes(study, rows, looks) or next(iter(_curves(study, looks)), None)


def sections(study: Study, rows: Sequence[Row]) -> dict[str, list[ReportFigure]]:
    """All other figures that the study's runs have data for, by heading."""
    looks = arm_looks(study)
    curves = _curves(study, looks)
    if all(row.judged is None for row in rows):
        curves = curves[1:]  # the first one is the headline
    found = {
        "Every run": _every_run(study, looks),
        "What each teacher adds": _left_out(study),
        "Training curves": curves,
        "Calibration": _reliability(study, looks),
        "Errors and fusion weights by layer": [
            *_errors(study, looks), *_explained(study), *_routing(study), *_layer_maps(study)
        ],
        "Alignments and projectors": [*_alignments(study), *_spectra(study)],
    }  # fmt: skip
    return {heading: figures for heading, figures in found.items() if figures}


def _by_label(study: Study, figure: Callable[[Run], float | None]) -> dict[str, list[float]]:
    return {arm.label: found for arm in study.arms if (found := arm.values(figure))}


def _runs(study: Study, labels: Mapping[str, object] | None = None) -> tuple[Run, ...]:
    """Runs of the arms labelled, or of all."""
    return tuple(
        run for arm in study.arms if labels is None or arm.label in labels for run in arm.runs
    )


def _changes(study: Study, rows: Sequence[Row], looks: Mapping[str, Look]) -> ReportFigure | None:
    """Every arm's change against the baseline, the best first."""
    ranked = [row for row in sorted(rows, key=lambda row: -row.gain) if row.judged is not None]
    if not ranked:
        return None
    _, unit, scale = ranked[0].change
    measures = {" %": "perplexity, %", " points": "exact match, points"}
    better = "right" if unit == " points" else "left"
    x_label = f"change in {measures.get(unit, unit.strip())} ({better} is better)"
    estimates = {row.arm.label: row.change[0] for row in ranked}
    figure = plots.forest(estimates, looks, x_label, f"Against {study.baseline}", scale)
    caption = (
        f"Each arm against {study.baseline}. Dots are the measured change, lines its 95 % "
        "confidence interval; one that includes zero is compatible with no effect."
    )
    return ReportFigure("forest", caption, figure, _runs(study))


def _every_run(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    bits = _by_label(study, BITS.of_run)
    if not bits or len(_runs(study)) == 1:
        return []
    caption = (
        "One dot per run, a bar at each arm's mean: the results before any statistics. Lower is "
        "better. Where two rows overlap, other seeds could reverse the order of the arms."
    )
    figure = plots.dots(bits, looks, "bits per character", "Every run")
    return [ReportFigure("runs", caption, figure, _runs(study))]


def _left_out(study: Study) -> list[ReportFigure]:
    found = []
    for full, without in left_out(study).items():
        estimates = {}
        for teacher, arm in without.items():
            pairs = paired(study.arm(full), arm, LOG_PERPLEXITY)
            if pairs is not None:
                estimates[teacher] = relative(against(pairs, LOG_PERPLEXITY).change)
        if not estimates:
            continue
        looks = {teacher: look(idx) for idx, teacher in enumerate(estimates)}
        title = f"Teachers of {full}"
        figure = plots.forest(estimates, looks, "change in perplexity, %", title, 100)
        caption = (
            f"The arm {full} against the same arm without one of its teachers. Left of zero, the "
            "teacher adds something that the others lack; at zero, it is redundant."
        )
        runs = study.arm(full).runs + tuple(run for arm in without.values() for run in arm.runs)
        found.append(ReportFigure(f"left-out-{full}", caption, figure, runs))
    return found


def _curves(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    found = []
    for key, (title, y_label, caption) in CURVES.items():
        series = {
            arm.label: curves
            for arm in study.arms
            if len(_common_steps(curves := [run.curve(key) for run in arm.runs])) > 1
        }
        if series:
            figure = plots.bands(series, looks, y_label, title)
            name = key.replace("_", "-")
            found.append(ReportFigure(name, caption, figure, _runs(study, series)))
    return found


def _common_steps(curves: Sequence[plots.Points]) -> set[float]:
    """Runs that stopped at different steps may have none in common, and one makes no curve."""
    return set.intersection(*(set(steps) for steps, _ in curves))


def _reliability(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    bins = {
        arm.label: _pooled(of_runs)
        for arm in study.arms
        if (of_runs := [b for run in arm.runs for b in run.record.get("calibration", ())])
    }
    if not bins:
        return []
    caption = (
        "Accuracy of the students' most likely next token by its confidence, tokens of all seeds "
        f"pooled, in {CALIBRATION_BINS} bins. The dotted line is perfect calibration: below it a "
        "student is overconfident, above it underconfident."
    )
    figure = plots.reliability(bins, looks)
    return [ReportFigure("reliability", caption, figure, _runs(study, bins))]


def _pooled(bins: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """Confidence and accuracy by bin, tokens of all runs together."""
    totals: dict[int, list[float]] = {}
    for found in bins:
        idx = min(int(found["confidence"] * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        sums = totals.setdefault(idx, [0.0, 0.0, 0.0])
        for which, value in enumerate((1.0, found["confidence"], found["accuracy"])):
            sums[which] += found["num_tokens"] * value
    ordered = [totals[idx] for idx in sorted(totals)]
    return [c / num for num, c, _ in ordered], [a / num for num, _, a in ordered]


def _errors(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    found = []
    for kind, plural in PLURALS.items():
        series = {
            arm.label: _mean_rows([run.diagnostics["error_by_layer"][kind] for run in arm.runs])
            for arm in study.arms
            if kind in arm.runs[0].diagnostics.get("error_by_layer", ())
        }
        if series:
            figure = plots.over_layers(
                series, "error (1 = the mean)", f"Error of the {plural} by layer", looks=looks
            )
            caption = (
                f"Error of each layer of the trained students against its {kind} target, mean over "
                "seeds: 0 is perfect, predicting the mean scores 1. A layer that stays near 1 "
                "learned nothing from the teachers."
            )
            name = f"error-by-layer-{kind}"
            found.append(ReportFigure(name, caption, figure, _runs(study, series)))
    return found


def _explained(study: Study) -> list[ReportFigure]:
    """Per kind, a line per arm and teacher whose maps were fitted before the first step."""
    found = []
    for kind, plural in PLURALS.items():
        series = {
            f"{arm.label}: {teacher}": [float(share) for share in layers[kind]]
            for arm in study.arms
            for teacher, layers in arm.runs[0].record.get("explained_at_start", {}).items()
            if None not in layers.get(kind, (None,))
        }
        if series:
            title = f"Variance of {plural} explained at the start"
            figure = plots.over_layers(series, "share of the variance", title, limits=(None, 1))
            caption = (
                f"Share of the variance of each layer's target {plural} that the maps fitted to a "
                "pilot explain on texts that they were not fitted to: how much of a teacher the "
                "initial student already holds, linearly. The rest is what there is left to teach."
            )
            found.append(ReportFigure(f"explained-{kind}", caption, figure, _runs(study)))
    return found


def _has_routing(run: Run) -> bool:
    """Whether the run's fusion weights could vary."""
    several = len(run.diagnostics.get("teachers", ())) > 1
    return several and run.config["fusion"]["method"] != "fixed"


def _routing(study: Study) -> list[ReportFigure]:
    found = []
    for arm in study.arms:
        if not _has_routing(arm.runs[0]):
            continue
        weights = [run.diagnostics["weights"] for run in arm.runs]
        teachers = list(arm.runs[0].diagnostics["teachers"])
        layers = {name: _mean_rows([w["by_layer"][name] for w in weights]) for name in teachers}
        tasks = {
            task: {name: float(np.mean([w["by_task"][task][name] for w in weights]))
                   for name in teachers}
            for task in weights[0]["by_task"]
            if all(task in w["by_task"] for w in weights)
        }  # fmt: skip
        caption = f"Fusion weight of each teacher in {arm.label}; the weights sum to 1. "
        curves = "During training; constant weights mean that the router learned nothing."
        drawn = {
            "weights": (curves, _weight_curves(arm.runs, arm.label)),
            "weights-by-layer": (
                "By layer of the student, after training.",
                plots.over_layers(layers, "fusion weight", "Fusion weights by layer"),
            ),
        }  # fmt: skip
        if len(tasks) > 1:
            by_task = plots.weights_by_task(tasks)
            drawn["weights-by-task"] = ("By task of the sample, after training.", by_task)
        for name, (rest, figure) in drawn.items():
            found.append(ReportFigure(f"{name}-{arm.name}", caption + rest, figure, arm.runs))
    return found


def _weight_curves(runs: Sequence[Run], title: str) -> Figure:
    teachers = list(runs[0].diagnostics["teachers"])
    curves = {name: [run.curve(f"weight_{name}") for run in runs] for name in teachers}
    looks = {name: look(idx) for idx, name in enumerate(teachers)}
    title = f"Fusion weights: {title}"
    return plots.bands(curves, looks, "fusion weight", title, legend=True)


def _teachers(arm: Arm) -> dict[str, Any]:
    """Diagnostics of each teacher, from the arm's first run."""
    found: dict[str, Any] = arm.runs[0].diagnostics.get("teachers", {})
    return found


def _layer_maps(study: Study) -> list[ReportFigure]:
    """One figure: a line per teacher, and one more for each arm with another map."""
    depths: dict[str, list[float]] = {}
    for arm in study.arms:
        for name, teacher in _teachers(arm).items():
            if depths.setdefault(name, teacher["layer_map"]) != teacher["layer_map"]:
                depths[f"{name} in {arm.name}"] = teacher["layer_map"]
    if not depths:
        return []
    caption = (
        "Teacher layer that each student layer is trained against. A fractional layer interpolates "
        "between its two neighbours."
    )
    runs = tuple(run for arm in study.arms if _teachers(arm) for run in arm.runs)
    figure = plots.over_layers(depths, "teacher layer", "Layer map (fractions interpolate)")
    return [ReportFigure("layer-map", caption, figure, runs)]


def _alignments(study: Study) -> list[ReportFigure]:
    """One figure per teacher, of the first arm that has it."""
    found: dict[str, ReportFigure] = {}
    for arm in study.arms:
        for name, teacher in _teachers(arm).items():
            if name in found:
                continue
            caption = (
                f"The first training text in tokens of the student (rows) and of {name} (columns). "
                "Blue marks the teacher tokens that a student token's target is made of; a clean "
                "diagonal means that the two tokenizations agree."
            )
            figure = plots.alignment(teacher["alignment"], name)
            found[name] = ReportFigure(f"alignment-{name}", caption, figure, arm.runs[:1])
    return list(found.values())


def _spectra(study: Study) -> list[ReportFigure]:
    caption = (
        "Singular values of the projectors between teacher and student in {}, largest first. A "
        "steep fall means that few directions of the teacher are used."
    )
    return [
        ReportFigure(
            f"spectra-{arm.name}", caption.format(arm.label), plots.spectra(spectra), arm.runs[:1]
        )
        for arm in study.arms
        if (spectra := arm.runs[0].diagnostics.get("spectra"))
    ]


def _mean_rows(rows: Sequence[Sequence[float | None]]) -> list[float]:
    return [float(value) for value in np.mean(np.array(rows, float), axis=0)]
