"""Results of a study: one row per arm, its verdict, and the summary in sentences.

The page, the Markdown and the CSV show the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvdistill.studies import statistics
from kvdistill.studies.report.comparison import (
    BITS,
    EXACT_MATCH,
    LOG_PERPLEXITY,
    TESTS,
    Comparison,
    compare,
    relative,
)
from kvdistill.studies.report.reading import Arm, Study
from kvdistill.studies.statistics import Estimate, Interval

ALPHA: Final = 0.05
"""Significance level of the verdicts."""
NONE: Final = "–"
UNKNOWN: Final = Estimate(math.nan)
OVER: Final = {"texts": "over texts", "seeds": "over seeds", "both": "over seeds and texts"}


@dataclass(frozen=True)
class Row:
    """One arm. Figures that its runs did not record are None."""

    arm: Arm
    is_baseline: bool
    bits: Estimate | None
    """Bits per character: mean over seeds, and its interval over seeds."""
    perplexity: float | None
    """Per token, geometric mean over seeds."""
    calibration: float | None
    """Expected calibration error, mean over seeds."""
    exact_match: float | None
    comparison: Comparison | None
    """In bits per character; None for the baseline, or where nothing could be paired."""
    perplexity_change: Estimate | None
    """Relative: -0.1 is 10 % lower."""
    exact_match_comparison: Comparison | None

    @property
    def p(self) -> float | None:
        """Corrected p-value of the most demanding test that could be made."""
        found = self.comparison
        if found is None or found.main_test is None:
            return None
        return found.corrected[found.main_test]

    @property
    def verdict(self) -> str:
        """Better, worse or no significant difference, or why there is no verdict."""
        if self.is_baseline:
            return "baseline"
        if self.comparison is None:
            return "not comparable"
        if self.p is None:
            return "one seed: not tested"
        if self.p >= ALPHA:
            return "no significant difference"
        return "better" if self.comparison.change.value < 0 else "worse"


def result_rows(study: Study) -> list[Row]:
    """One row per arm, in the order of the arms."""
    bits, perplexity, matches = (
        compare(study, measure) for measure in (BITS, LOG_PERPLEXITY, EXACT_MATCH)
    )
    found = []
    for arm in study.arms:
        own = arm.values(BITS.of_run)
        log_perplexity = mean_of(arm.values(LOG_PERPLEXITY.of_run))
        change = perplexity.get(arm.name)
        row = Row(
            arm=arm,
            is_baseline=arm.name == study.baseline,
            bits=Estimate(sum(own) / len(own), statistics.bootstrap(own)) if own else None,
            perplexity=None if log_perplexity is None else math.exp(log_perplexity),
            calibration=mean_of(arm.values(lambda run: run.metrics.get("eval_calibration_error"))),
            exact_match=mean_of(arm.values(EXACT_MATCH.of_run)),
            comparison=bits.get(arm.name),
            perplexity_change=None if change is None else relative(change.change),
            exact_match_comparison=matches.get(arm.name),
        )
        found.append(row)
    return found


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None of no values."""
    return sum(values) / len(values) if values else None


def csv_line(row: Row) -> dict[str, Any]:
    """One line of the CSV; without the keys of figures that there are not."""
    line: dict[str, Any] = {
        "arm": row.arm.name,
        "placebo": int(row.arm.placebo),
        "teachers": " ".join(row.arm.teachers),
        "num_runs": len(row.arm.runs),
        "seeds": " ".join(str(run.seed) for run in row.arm.runs),
        "bits_per_character": None if row.bits is None else row.bits.value,
        "perplexity": row.perplexity,
        "calibration_error": row.calibration,
        "exact_match": row.exact_match,
        "verdict": row.verdict,
        **_with_bounds("perplexity_change", row.perplexity_change),
    }
    found = row.comparison
    if found is not None:
        line |= {
            **_with_bounds("bits_change", found.change),
            "paired_seeds": found.num_seeds,
            "paired_texts": found.num_texts,
            "hedges_g_seeds": found.effect_seeds,
            "hedges_g_texts": found.effect_texts,
            "better_texts": found.better_texts,
        }
        line |= {f"p_{test}": found.p.get(test) for test in TESTS}
        line |= {f"p_{test}_holm": found.corrected.get(test) for test in TESTS}
    return line


def _with_bounds(key: str, estimate: Estimate | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {key: None if estimate is None else estimate.value}
    if estimate is not None and estimate.interval is not None:
        found |= {f"{key}_low": estimate.interval.low, f"{key}_high": estimate.interval.high}
    return found


def format_number(
    value: float | None,
    digits: int = 3,
    *,
    signed: bool = False,
    scale: float = 1.0,
    unit: str = "",
) -> str:
    """``scale * value`` with fixed digits and a true minus sign; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = round(scale * value, digits) + 0.0  # not -0.0
    return f"{rounded:{'+' if signed else ''}.{digits}f}{unit}".replace("-", "−")


def percent(value: float | None, digits: int = 1, *, signed: bool = True) -> str:
    """A share in percent."""
    return format_number(value, digits, signed=signed, scale=100, unit=" %")


def format_interval(
    interval: Interval | None, digits: int = 1, *, scale: float = 1.0, unit: str = ""
) -> str:
    """``low to high``; empty for None. Bounds scaled to percent have a sign."""
    if interval is None:
        return ""
    low, high = (
        format_number(bound, digits, signed=scale != 1, scale=scale)
        for bound in (interval.low, interval.high)
    )
    return f"{low} to {high}{unit}"


def format_p(p: float | None) -> str:
    """A p-value with two significant figures, down to 0.0001."""
    if p is None:
        return NONE
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def summary(study: Study, rows: Sequence[Row]) -> list[str]:
    """The findings in a few sentences, with their limits."""
    compared = [row for row in rows if row.comparison is not None]
    real = sorted((row for row in compared if not row.arm.placebo), key=_bits_change)
    sentences = []
    if real:
        best = real[0]
        place = "the best arm is" if _bits_change(best) < 0 else "no arm is better; the closest is"
        change = f"{_change(best)}{_significance(best)}"
        sentences.append(f"Against {study.baseline}, {place} {best.arm.name}: {change}.")
        better = [row for row in real[1:] if row.verdict == "better"]
        if better:
            listed = ", ".join(f"{row.arm.name} ({_change(row)})" for row in better)
            sentences.append(f"Also significantly better: {listed}.")
        worse = [row.arm.name for row in reversed(real) if row.verdict == "worse"]
        if worse:
            sentences.append(f"Significantly worse: {', '.join(worse)}.")
    sentences += [_placebo_sentence(row, study.baseline) for row in compared if row.arm.placebo]
    return sentences + _limits(compared)


def _bits_change(row: Row) -> float:
    return row.comparison.change.value if row.comparison is not None else 0.0


def _change(row: Row) -> str:
    if row.perplexity_change is not None:
        interval = format_interval(row.perplexity_change.interval, scale=100, unit=" %")
        change = f"perplexity {percent(row.perplexity_change.value)}"
    else:
        bits = UNKNOWN if row.comparison is None else row.comparison.change
        interval = format_interval(bits.interval, 3)
        change = f"{format_number(bits.value, signed=True)} bits per character"
    return f"{change}, 95 % CI {interval}" if interval else change


def _significance(row: Row) -> str:
    test = row.comparison and row.comparison.main_test
    if not test:
        return "; from one seed, so not tested"
    significant = "significant" if row.verdict in {"better", "worse"} else "not significant"
    return f"; {significant} {OVER[test]} (corrected p {format_p(row.p)})"


def _placebo_sentence(row: Row, baseline: str) -> str:
    name = row.arm.name if "placebo" in row.arm.name else f"The placebo {row.arm.name}"
    if row.p is None:
        return f"{name} has one seed and is not tested ({_change(row)})."
    if row.verdict == "better":
        return (
            f"{name} is better too ({_change(row)}): that much of any gain is regularisation, not "
            "knowledge of the teacher."
        )
    if row.verdict == "worse":
        return f"{name} is worse than {baseline} ({_change(row)})."
    return f"{name} shows no significant difference from {baseline} ({_change(row)})."


def _limits(compared: Sequence[Row]) -> list[str]:
    found = [row.comparison for row in compared if row.comparison is not None]
    if not found:
        return []
    num_seeds = min(comparison.num_seeds for comparison in found)
    least_p = statistics.smallest_p(num_seeds)
    limits = []
    if num_seeds == 1:
        limits.append(
            "An arm shares a single seed with the baseline: its interval is over texts alone, and "
            "a small difference may be due to the seed."
        )
    elif least_p >= ALPHA:
        limits.append(
            f"With {num_seeds} seeds the test over seeds alone cannot give p < {least_p:.3g}, "
            "however large the gain."
        )
    if any(not comparison.num_texts for comparison in found):
        limits.append("Some runs recorded no scores per text: they are compared by seed alone.")
    return limits
