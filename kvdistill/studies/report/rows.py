"""The results table: one row per arm, the same for the page, for Markdown and for CSV."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kvdistill.studies import statistics
from kvdistill.studies.report.comparison import (
    BITS,
    EXACT_MATCH,
    LOG_PERPLEXITY,
    TESTS,
    Comparison,
    Measure,
    compare,
    relative,
)
from kvdistill.studies.report.reading import Arm, Run, Study
from kvdistill.studies.statistics import Interval

ALPHA: Final = 0.05
"""Below it, an arm is called better or worse."""


@dataclass(frozen=True)
class Row:
    """One arm. Figures that its runs did not have are None."""

    arm: Arm
    is_baseline: bool
    bits: float | None
    """Bits per character, the mean over seeds."""
    bits_interval: Interval | None
    """Of that mean: other seeds, the same texts."""
    perplexity: float | None
    """Per token, the geometric mean over seeds."""
    calibration: float | None
    exact_match: float | None
    comparison: Comparison | None
    """In bits per character; None for the baseline, or where nothing could be paired."""
    perplexity_change: float | None
    """Relative: -0.1 is 10 % lower."""
    perplexity_interval: Interval | None
    exact_match_comparison: Comparison | None

    @property
    def p(self) -> float | None:
        """Corrected p-value of the most demanding test that could be made."""
        found = self.comparison
        return (
            None if found is None or found.main_test is None else found.corrected[found.main_test]
        )

    @property
    def verdict(self) -> str:
        """Better, worse, or not told apart: in a word."""
        if self.is_baseline:
            return "baseline"
        if self.comparison is None:
            return "cannot be compared"
        if self.p is None:
            return "one seed: no verdict"
        if self.p >= ALPHA:
            return "not told apart"
        return "better" if self.comparison.change < 0 else "worse"


def rows(study: Study) -> list[Row]:
    """One row per arm, in their order."""
    bits, perplexity = compare(study, BITS), compare(study, LOG_PERPLEXITY)
    matches = compare(study, EXACT_MATCH)
    return [
        _row(
            arm,
            arm.name == study.baseline,
            bits.get(arm.name),
            perplexity.get(arm.name),
            matches.get(arm.name),
        )
        for arm in study.arms
    ]


def values(arm: Arm, figure: Callable[[Run], float | None]) -> list[float]:
    """A figure of every run of an arm that has it."""
    return [value for run in arm.runs if (value := figure(run)) is not None]


def _row(
    arm: Arm,
    is_baseline: bool,
    bits: Comparison | None,
    perplexity: Comparison | None,
    matches: Comparison | None,
) -> Row:
    own = values(arm, lambda run: BITS.of_run(run.metrics))
    log_perplexity = _mean_of_runs(arm, LOG_PERPLEXITY)
    calibration = values(arm, lambda run: run.metrics.get("eval_calibration_error"))
    change = None if perplexity is None else perplexity.interval
    return Row(
        arm=arm,
        is_baseline=is_baseline,
        bits=sum(own) / len(own) if own else None,
        bits_interval=statistics.bootstrap(own) if own else None,
        perplexity=None if log_perplexity is None else math.exp(log_perplexity),
        calibration=sum(calibration) / len(calibration) if calibration else None,
        exact_match=_mean_of_runs(arm, EXACT_MATCH),
        comparison=bits,
        perplexity_change=None if perplexity is None else relative(perplexity.change),
        perplexity_interval=change and Interval(relative(change.low), relative(change.high)),
        exact_match_comparison=matches,
    )


def _mean_of_runs(arm: Arm, measure: Measure) -> float | None:
    found = values(arm, lambda run: measure.of_run(run.metrics))
    return sum(found) / len(found) if found else None


def plain(row: Row) -> dict[str, Any]:
    """One line of the CSV; empty where there is no figure."""
    line: dict[str, Any] = {
        "arm": row.arm.name,
        "placebo": int(row.arm.placebo),
        "teachers": " ".join(row.arm.teachers),
        "num_runs": len(row.arm.runs),
        "seeds": " ".join(str(run.seed) for run in row.arm.runs),
        "bits_per_character": row.bits,
        "perplexity": row.perplexity,
        "calibration_error": row.calibration,
        "exact_match": row.exact_match,
        "verdict": row.verdict,
        "perplexity_change": row.perplexity_change,
    }
    if row.perplexity_interval is not None:
        line["perplexity_change_low"] = row.perplexity_interval.low
        line["perplexity_change_high"] = row.perplexity_interval.high
    found = row.comparison
    if found is not None:
        line |= {
            "bits_change": found.change,
            "paired_seeds": found.num_seeds,
            "paired_texts": found.num_texts,
            "hedges_g_seeds": found.effect_seeds,
            "hedges_g_texts": found.effect_texts,
            "better_texts": found.better_texts,
        }
        line |= {f"p_{test}": found.p.get(test) for test in TESTS}
        line |= {f"p_{test}_holm": found.corrected.get(test) for test in TESTS}
        if found.interval is not None:
            line |= {"bits_change_low": found.interval.low, "bits_change_high": found.interval.high}
    return line
