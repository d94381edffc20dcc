"""A figure with its words and its runs, and how arms are named in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from matplotlib.figure import Figure

from kvdistill.studies import plots as of_arms
from kvdistill.studies import plots as single
from kvdistill.studies.plots import Look, look
from kvdistill.studies.report.reading import Arm, Run, Study, shown

T = TypeVar("T")


@dataclass(frozen=True)
class ReportFigure:
    """A figure, what it shows and how to read it, and the runs that it is made from."""

    name: str
    """Unique in a report, and fit for a file's name."""
    words: str
    figure: Figure
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class FigureSection:
    """Figures under one heading."""

    heading: str
    figures: tuple[ReportFigure, ...]
    folded: bool = False
    """Shown only to who asks."""


def named(study: Study, by_arm: Mapping[str, T]) -> dict[str, T]:
    """What is kept by an arm's name, by its shown name and in the order of the arms."""
    return {shown(arm): by_arm[arm.name] for arm in study.arms if arm.name in by_arm}


def runs_of(study: Study, by_arm: Mapping[str, object] | None = None) -> tuple[Run, ...]:
    """Runs of the arms named, or of all."""
    arms = [arm for arm in study.arms if by_arm is None or arm.name in by_arm]
    return tuple(run for arm in arms for run in arm.runs)


def run_figures(run: Run) -> dict[str, Figure]:
    """Every figure of one run, by a name that a file can have; none without teachers."""
    told = run.diagnostics
    if not told:
        return {}
    found = {
        "layer-map": single.layer_map_lines(_layer_depths(run)),
        "error-by-layer": single.error_by_layer(told["error_by_layer"]),
        "spectra": single.spectra(told["spectra"]),
    }
    if routes(run):
        found["weights"] = _mean_weights([run], list(told["teachers"]), run.name)
        found["weights-by-layer"] = single.weights_by_layer(told["weights"]["by_layer"])
        found["weights-by-task"] = single.weights_by_task(told["weights"]["by_task"])
    for name, teacher in told["teachers"].items():
        found[f"alignment-{name}"] = single.alignment(teacher["alignment"], name)
    return found


def inside(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    """Errors by layer, routing and layer maps of a study."""
    return [
        *_errors(study, looks),
        *(drawn for arm in study.arms if routes(arm.runs[0]) for drawn in _routing(arm)),
        *_maps(study),
    ]


def maps(study: Study) -> list[ReportFigure]:
    """Alignments and the projectors' spectra: for who wants to know how targets were made."""
    return [*_alignments(study), *_spectra_figure(study)]


def routes(run: Run) -> bool:
    """Whether a run had fusion weights that it could choose."""
    several = len(run.diagnostics.get("teachers", ())) > 1
    return several and run.config["fusion"]["method"] != "fixed"


def _errors(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    found = []
    for kind in ("key", "value"):
        series = {
            arm.name: _mean_rows([run.diagnostics["error_by_layer"][kind] for run in arm.runs])
            for arm in study.arms
            if arm.runs[0].diagnostics
        }
        if series:
            figure = of_arms.by_layer(
                named(study, series), named(study, looks), "error (1 = the mean)",
                f"Error of the {kind}s by layer",
            )  # fmt: skip
            words = (
                f"How far each layer of the trained students is from its {kind} target; 1 is what "
                "guessing the average scores, 0 would be perfect. Layers that stay near 1 learned "
                "nothing from the teachers. The mean of an arm's seeds."
            )
            found.append(
                ReportFigure(f"error-by-layer-{kind}", words, figure, runs_of(study, series))
            )
    return found


def _routing(arm: Arm) -> list[ReportFigure]:
    told = [run.diagnostics["weights"] for run in arm.runs]
    teachers = list(arm.runs[0].diagnostics["teachers"])
    words = (
        f"How much each teacher counts in {shown(arm)}, as its router chose. The weights of all "
        "teachers add up to 1; "
    )
    over_training = (
        "a router that stays where it began has learned nothing. A line is the mean of the seeds, "
        "its band reaches from the lowest to the highest."
    )
    layers = {name: _mean_rows([t["by_layer"][name] for t in told]) for name in teachers}
    tasks = {
        task: {name: float(np.mean([t["by_task"][task][name] for t in told])) for name in teachers}
        for task in told[0]["by_task"]
        if all(task in t["by_task"] for t in told)
    }
    found = [
        ReportFigure(
            f"weights-{arm.name}", words + over_training,
            _mean_weights(arm.runs, teachers, shown(arm)), arm.runs,
        ),
        ReportFigure(
            f"weights-by-layer-{arm.name}",
            words + "here for each layer of the student, after training.",
            single.weights_by_layer(layers), arm.runs,
        ),
    ]  # fmt: skip
    if len(tasks) > 1:
        by_task = words + "here for each task that samples are tagged with, after training."
        figure = single.weights_by_task(tasks)
        found.append(ReportFigure(f"weights-by-task-{arm.name}", by_task, figure, arm.runs))
    return found


def _mean_weights(runs: Sequence[Run], teachers: Sequence[str], title: str) -> Figure:
    curves = {name: [run.curve(f"weight_{name}") for run in runs] for name in teachers}
    looks = {name: look(idx) for idx, name in enumerate(teachers)}
    return of_arms.bands(curves, looks, "fusion weight", f"Fusion weights: {title}")


def _maps(study: Study) -> list[ReportFigure]:
    """One figure: a line per teacher, and one more where an arm maps it otherwise."""
    depths: dict[str, list[float]] = {}
    for arm in study.arms:
        for name, teacher in arm.runs[0].diagnostics.get("teachers", {}).items():
            if depths.setdefault(name, teacher["layer_map"]) != teacher["layer_map"]:
                depths[f"{name} in {arm.name}"] = teacher["layer_map"]
    if not depths:
        return []
    words = (
        "Which layer of a teacher each layer of the student learns from. A depth between two "
        "layers is a mixture of both."
    )
    learning = {arm.name: arm for arm in study.arms if arm.runs[0].diagnostics}
    return [
        ReportFigure("layer-map", words, single.layer_map_lines(depths), runs_of(study, learning))
    ]


def _alignments(study: Study) -> list[ReportFigure]:
    """One per teacher, of the first arm that has it."""
    found: dict[str, ReportFigure] = {}
    for arm in study.arms:
        for name, teacher in arm.runs[0].diagnostics.get("teachers", {}).items():
            words = (
                f"The first training text, as the student's tokens (rows) and {name}'s (columns) "
                "cut it. Blue is where the student's token takes its target from: a clean diagonal "
                "is tokenizers that agree."
            )
            if name not in found:
                figure = single.alignment(teacher["alignment"], name)
                found[name] = ReportFigure(f"alignment-{name}", words, figure, arm.runs[:1])
    return list(found.values())


def _spectra_figure(study: Study) -> list[ReportFigure]:
    words = (
        "Singular values of the maps between teacher and student in {}, largest first. A steep "
        "fall means that few directions of the teacher are used."
    )
    return [
        ReportFigure(
            f"spectra-{arm.name}",
            words.format(shown(arm)),
            single.spectra(arm.runs[0].diagnostics["spectra"]),
            arm.runs[:1],
        )
        for arm in study.arms
        if arm.runs[0].diagnostics.get("spectra")
    ]


def _layer_depths(run: Run) -> dict[str, Any]:
    return {name: teacher["layer_map"] for name, teacher in run.diagnostics["teachers"].items()}


def _mean_rows(rows: Sequence[Sequence[float]]) -> list[float]:
    return [float(value) for value in np.mean(rows, axis=0)]


# MERGED-DOC pipelines.report.inside
# Figures of what a student learned and how: of one run, or of a study's arms.
