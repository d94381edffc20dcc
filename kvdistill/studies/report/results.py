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
    def judged(self) -> Comparison | None:
        """What the verdict is on: bits per character, or exact match of runs that have no other."""
        return self.comparison if self.bits is not None else self.exact_match_comparison

    @property
    def gain(self) -> float:
        """Improvement of what is judged: positive is better, 0 where nothing was compared."""
        change = 0.0 if self.judged is None else self.judged.change.value
        return change if self.bits is None else -change

    @property
    def change(self) -> tuple[Estimate, str, float]:
        """Change of the perplexity, or else of what is judged; its unit, and that as a factor."""
        if self.perplexity_change is not None:
            return self.perplexity_change, " %", 100
        found = UNKNOWN if self.judged is None else self.judged.change
        return (found, " points", 100) if self.bits is None else (found, " bits per character", 1)

    @property
    def shown_change(self) -> tuple[str, str]:
        """Change and interval as text."""
        (found, unit, scale), digits = self.change, 1 if self.change[2] == 100 else 3
        value = format_number(found.value, digits, signed=True, scale=scale, unit=unit)
        return value, format_interval(found.interval, digits, scale=scale, unit=unit)

    @property
    def p(self) -> float | None:
        """Corrected p-value of the most demanding test that could be made."""
        found = self.judged
        if found is None or found.main_test is None:
            return None
        return found.corrected[found.main_test]

    @property
    def verdict(self) -> str:
        """Better, worse or no significant difference, or why there is no verdict."""
        if self.is_baseline:
            return "baseline"
        if self.judged is None:
            return "not comparable"
        if self.p is None:
            return "one seed: not tested"
        if self.p >= ALPHA:
            return "no significant difference"
        return "better" if self.gain > 0 else "worse"


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


def question(study: Study) -> str:
    """What the study asks: its own words, or what its arms amount to."""
    baseline = study.arm(study.baseline)
    real = [arm for arm in study.arms if arm is not baseline and not arm.placebo]
    if study.question or len(study.arms) == 1:
        return study.question or f"How good is the student of {baseline.name}?"
    if not baseline.teachers and any(arm.teachers for arm in study.arms):
        return "Does a student learn more with its teachers than from the text alone?"
    names = real[0].name if len(real) == 1 else f"any of {len(real)} other arms"
    return f"Is {names} better than {study.baseline}?"


def answer_of(study: Study, rows: Sequence[Row]) -> str:
    """The result in a sentence or two, as far as it goes."""
    if len(rows) == 1:
        return _figures_of(rows[0])
    real = [row for row in rows if row.judged is not None and not row.arm.placebo]
    if not real:
        return f"Open: no arm but placebos was scored on the texts of {study.baseline}."
    best = max(real, key=lambda row: (row.verdict == "better", row.gain))
    name, change = best.arm.name, f"{_change(best)}{_significance(best)}"
    if best.p is None:
        return f"Not tested, with one seed. The best arm is {name}: {change}."
    if best.verdict != "better":
        if best.gain <= 0:
            return f"No: no arm is better than {study.baseline}; the closest is {name}: {change}."
        return f"Not shown: the best arm is {name}: {change}."
    placebos = [row for row in rows if row.arm.placebo and row.p is not None]
    gaining = [row.arm.name for row in placebos if row.verdict == "better"]
    if gaining:
        rest = f" Part of it is no knowledge of a teacher: so is the placebo {', '.join(gaining)}."
    else:
        rest = " No placebo is better." if placebos else ""
    return f"Yes: {name} is better than {study.baseline}: {change}.{rest}"


def _figures_of(row: Row) -> str:
    """The figures of a study of one arm."""
    run = row.arm.runs[0]
    steps, name = run.record["steps"], row.arm.name
    if row.perplexity is None:
        if row.exact_match is None:
            return f"{name} was trained for {steps} steps; no held-out text scores it."
        right = percent(row.exact_match, signed=False)
        return f"After {steps} steps {name} answers {right} of the held-out problems correctly."
    earlier = [(step, value) for step, value in zip(*run.curve("eval_perplexity"), strict=True)]
    before = ""
    if earlier and earlier[0][0] < steps:
        before = f" ({format_number(earlier[0][1], 1)} after {earlier[0][0]:.0f})"
    return (
        f"After {steps} steps the perplexity of {name} on held-out text is "
        f"{format_number(row.perplexity, 1)}{before}."
    )


def _change(row: Row) -> str:
    value, interval = row.shown_change
    measure = {" %": "perplexity ", " points": "exact match "}.get(row.change[1], "")
    return f"{measure}{value}" + (f", 95 % CI {interval}" if interval else "")


def _significance(row: Row) -> str:
    test = row.judged and row.judged.main_test
    if not test:
        return ""
    significant = "significant" if row.verdict in {"better", "worse"} else "not significant"
    return f"; {significant} {OVER[test]} (corrected p {format_p(row.p)})"


def limits(rows: Sequence[Row]) -> list[str]:
    """What the comparisons cannot show, in sentences."""
    found = [row.judged for row in rows if row.judged is not None]
    if not found:
        return []
    num_seeds = min(comparison.num_seeds for comparison in found)
    least_p = statistics.smallest_p(num_seeds)
    sentences = []
    if num_seeds == 1:
        sentences.append(
            "An arm shares a single seed with the baseline: its interval is over texts alone, and "
            "a small difference may be due to the seed."
        )
    elif least_p >= ALPHA:
        sentences.append(
            f"With {num_seeds} seeds the test over seeds alone cannot give p < {least_p:.3g}, "
            "however large the gain."
        )
    if any(not comparison.num_texts for comparison in found):
        sentences.append("Some runs recorded no scores per text: they are compared by seed alone.")
    return sentences
