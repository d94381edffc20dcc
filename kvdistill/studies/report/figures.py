"""Which figures a study gets, each with the words that make it readable without the code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from kvdistill.studies import plots
from kvdistill.studies.plots import Estimate, Look, look
from kvdistill.studies.report.comparison import (
    BITS,
    LOG_PERPLEXITY,
    against,
    left_out,
    paired,
    relative,
)
from kvdistill.studies.report.reading import Run, Study
from kvdistill.studies.report.rows import Row, values
from kvdistill.studies.report.run_figures import (
    FigureSection,
    ReportFigure,
    inside,
    maps,
    named,
    runs_of,
)
from kvdistill.studies.statistics import Interval

CURVES: Final = {
    "eval_bits_per_character": (
        "Held-out text",
        "bits per character",
        "How well the students predict text that they have never seen, while they train. Fewer "
        "bits per character are better; the scale does not depend on a tokenizer.",
    ),
    "loss_cross_entropy": (
        "Training: cross-entropy",
        "nats per token",
        "The loss of predicting the next token of the training text: what every arm learns from. "
        "Lower here and not on held-out text would be learning by heart.",
    ),
    "loss_key": (
        "Training: key loss",
        "error (1 = the mean)",
        "How far the students' attention keys are from their target, before weighting. 1 is what "
        "guessing the average would score. A loss that falls to nothing is suspicious: a target "
        "that can move may have come to the student.",
    ),
    "loss_value": (
        "Training: value loss",
        "error (1 = the mean)",
        "The same for the attention's values.",
    ),
}


BEHAVIOUR: Final = {
    "calibration_error": (
        "Calibration",
        "expected calibration error",
        "Whether the students are right as often as they are sure. A student that gives its next "
        "token 70 % should be right 7 times in 10; the bar is the mean distance from that, over "
        "all tokens (Guo et al., arXiv 1706.04599). Shorter is better.",
    ),
    "exact_match": (
        "Exact match",
        "share of right answers",
        "The share of held-out problems that a student answers rightly when it writes the answer "
        "itself. Longer is better; a line reaches from the lowest seed to the highest.",
    ),
}


CALIBRATION_BINS: Final = 15


BAND: Final = (
    " A line is the mean of an arm's seeds; its band reaches from the lowest to the highest."
)


INTERVALS: Final = (
    " The dot is the measured change and the line its 95 % interval, over other seeds and other "
    "texts; a line that crosses zero may be chance."
)


def looks_of(study: Study) -> dict[str, Look]:
    """One look per arm through the whole report; dashed for placebos."""
    others = [arm for arm in study.arms if arm.name != study.baseline]
    found = {arm.name: look(idx, placebo=arm.placebo) for idx, arm in enumerate(others)}
    return found | {study.baseline: look(0, baseline=True)}


def sections(study: Study, table: Sequence[Row]) -> list[FigureSection]:
    """All figures that the study's runs have data for."""
    looks = looks_of(study)
    found = [
        FigureSection("Does it help?", tuple(_results(study, table, looks))),
        FigureSection("What each teacher adds", tuple(_left_out(study))),
        FigureSection("Over training", tuple(_curves(study, looks))),
        FigureSection("Calibration and answers", tuple(_behaviour(study, looks))),
        FigureSection("Inside the students", tuple(inside(study, looks))),
        FigureSection("How targets were made", tuple(maps(study)), folded=True),
        FigureSection("Cost", tuple(_cost(study, looks))),
    ]
    return [section for section in found if section.figures]


def _results(study: Study, table: Sequence[Row], looks: Mapping[str, Look]) -> list[ReportFigure]:
    found = []
    changes = {row.arm.name: e for row in table if (e := _perplexity(row)) is not None}
    in_bits = {row.arm.name: e for row in table if (e := _bits(row)) is not None}
    if changes or in_bits:
        figure = plots.forest(
            named(study, changes or in_bits),
            named(study, looks),
            "change of perplexity, %" if changes else "change of bits per character",
            f"Against {study.baseline}",
            percent=bool(changes),
        )
        words = f"Each arm against {study.baseline}; left of zero is better." + INTERVALS
        found.append(ReportFigure("forest", words + _placebos(study), figure, runs_of(study)))
    bits = _by_arm(study, lambda run: BITS.of_run(run.metrics))
    if bits:
        figure = plots.dots(
            named(study, bits), named(study, looks), "bits per character", "Every run"
        )
        words = (
            "One dot per run, one row per arm, a bar at each mean: the results as they are, before "
            "any statistics. Further left is better. Where rows overlap, other seeds could turn "
            "the order of two arms round."
        )
        found.append(ReportFigure("runs", words, figure, runs_of(study)))
    return found


def _left_out(study: Study) -> list[ReportFigure]:
    found = []
    for full, pairs in left_out(study).items():
        estimates = {}
        for teacher, without in pairs.items():
            pair = paired(study.arm(full), without, LOG_PERPLEXITY)
            if pair is not None:
                change = against(teacher, pair, LOG_PERPLEXITY)
                estimates[teacher] = _estimate(relative(change.change), _relative(change.interval))
        if not estimates:
            continue
        looks = {teacher: look(idx) for idx, teacher in enumerate(estimates)}
        figure = plots.forest(
            estimates, looks, "change of perplexity, %", f"Teachers of {full}", percent=True
        )
        words = (
            f"The arm {full} against the same arm without one of its teachers. Left of zero, the "
            "teacher named adds something that the others do not have; at zero, it could be left "
            "out." + INTERVALS
        )
        runs = study.arm(full).runs + tuple(run for arm in pairs.values() for run in arm.runs)
        found.append(ReportFigure(f"left-out-{full}", words, figure, runs))
    return found


def _curves(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    found = []
    for key, (title, y_label, words) in CURVES.items():
        series = {
            arm.name: curves
            for arm in study.arms
            if (curves := [run.curve(key) for run in arm.runs if run.curve(key)[0]])
        }
        if series:
            figure = plots.bands(named(study, series), named(study, looks), y_label, title)
            name = key.replace("_", "-")
            found.append(ReportFigure(name, words + BAND, figure, runs_of(study, series)))
    return found


def _behaviour(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    found = _reliability(study, looks)
    for name, (title, label, words) in BEHAVIOUR.items():
        key = f"eval_{name}"
        figures = {arm.name: v for arm in study.arms if (v := _known(arm.runs, key))}
        if figures:
            figure = plots.bars(named(study, figures), named(study, looks), label, title)
            found.append(
                ReportFigure(name.replace("_", "-"), words, figure, runs_of(study, figures))
            )
    return found


def _known(runs: Sequence[Run], key: str) -> list[float]:
    return [run.metrics[key] for run in runs if key in run.metrics]


def _reliability(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    bins = {
        arm.name: bins
        for arm in study.arms
        if (bins := [b for run in arm.runs for b in run.record.get("calibration", ())])
    }
    if not bins:
        return []
    words = (
        "How often the students' likeliest next token is the right one, by how sure they are of "
        "it. On the dotted line both are the same; below it a student is too sure of itself, above "
        "it not sure enough. Tokens of all seeds together, in 15 bins."
    )
    curves = {name: _pooled(found) for name, found in bins.items()}
    figure = plots.reliability(named(study, curves), named(study, looks))
    return [ReportFigure("reliability", words, figure, runs_of(study, curves))]


def _pooled(bins: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """Confidence and accuracy by bin, tokens of all runs together."""
    totals: dict[int, list[float]] = {}
    for found in bins:
        place = min(int(found["confidence"] * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        sums = totals.setdefault(place, [0.0, 0.0, 0.0])
        for idx, value in enumerate((1.0, found["confidence"], found["accuracy"])):
            sums[idx] += found["num_tokens"] * value
    ordered = [totals[place] for place in sorted(totals)]
    return [c / num for num, c, _ in ordered], [a / num for num, _, a in ordered]


def _cost(study: Study, looks: Mapping[str, Look]) -> list[ReportFigure]:
    minutes = _by_arm(study, lambda run: run.record["seconds"] / 60)
    figure = plots.bars(named(study, minutes), named(study, looks), "minutes", "Time of a run")
    words = (
        "How long training one student took, its evaluations included; reading the teachers came "
        "before and is in the table below. Runs that shared a machine with others are slower."
    )
    return [ReportFigure("time", words, figure, runs_of(study))]


def _perplexity(row: Row) -> Estimate | None:
    if row.perplexity_change is None:
        return None
    return _estimate(row.perplexity_change, row.perplexity_interval)


def _bits(row: Row) -> Estimate | None:
    if row.comparison is None:
        return None
    return _estimate(row.comparison.change, row.comparison.interval)


def _estimate(value: float, interval: Interval | None) -> Estimate:
    if interval is None:
        return Estimate(value)
    return Estimate(value, interval.low, interval.high)


def _relative(interval: Interval | None) -> Interval | None:
    return interval and Interval(relative(interval.low), relative(interval.high))


def _placebos(study: Study) -> str:
    if not any(arm.placebo for arm in study.arms):
        return ""
    return (
        " Placebos (dashed) give the student a target without knowledge in it: a gain that they "
        "share is regularisation."
    )


def _by_arm(study: Study, figure: Callable[[Run], float | None]) -> dict[str, list[float]]:
    return {arm.name: found for arm in study.arms if (found := values(arm, figure))}
