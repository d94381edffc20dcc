"""Numbers as people write them, and what the comparison says in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvdistill.studies.report.comparison import Comparison
from kvdistill.studies.report.reading import Study
from kvdistill.studies.report.rows import Row
from kvdistill.studies.statistics import Interval, smallest_p
from kvdistill.text import format_bytes

NONE = "–"


OVER = {
    "texts": "over texts",
    "seeds": "over seeds",
    "both": "over seeds and texts together",
}


def format_number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """Fixed digits, a real minus; a dash for what is not there."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = round(value, digits) + 0.0  # not -0.0
    return f"{rounded:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1, *, signed: bool = True) -> str:
    """A share in percent."""
    return (
        NONE if value is None or math.isnan(value) else points(value, digits, signed=signed) + " %"
    )


def points(value: float, digits: int = 1, *, signed: bool = True) -> str:
    """A hundred times a share: the difference of two percentages."""
    return format_number(100 * value, digits, signed=signed)


def span(interval: Interval | None, digits: int = 3) -> str:
    """An interval."""
    if interval is None:
        return ""
    return f"{format_number(interval.low, digits)} to {format_number(interval.high, digits)}"


def percent_span(interval: Interval | None) -> str:
    """An interval of shares."""
    return "" if interval is None else points_span(interval) + " %"


def points_span(interval: Interval | None) -> str:
    """An interval of differences of percentages."""
    return "" if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def p_value(p: float | None) -> str:
    """A p-value, two figures; nothing below a ten-thousandth is told apart."""
    if p is None:
        return NONE
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def optional_bytes(value: float | None) -> str:
    """A size; a dash for what was not measured."""
    return NONE if value is None else format_bytes(value)


def summary(study: Study, table: Sequence[Row]) -> list[str]:
    """What was found, in a few sentences, with what it does not say."""
    others = [row for row in table if row.comparison is not None]
    if not others:
        return []
    real = [row for row in others if not row.arm.placebo]
    said = []
    if real:
        best = min(real, key=_change)
        opening = "The best arm is" if _change(best) < 0 else "No arm is better; the next is"
        said.append(f"{opening} {_finding(best, study.baseline)}.")
        said += _others(best, real)
    said += [_placebo(row, study.baseline) for row in others if row.arm.placebo]
    return said + _limits(others)


def _finding(row: Row, baseline: str) -> str:
    found = row.comparison
    if found is None:
        return row.arm.name
    if row.perplexity_change is not None:
        interval = percent_span(row.perplexity_interval)
        what = f"perplexity {percent(row.perplexity_change)} against {baseline}"
    else:
        interval = span(found.interval)
        what = f"{format_number(found.change)} bits per character against {baseline}"
    within = f" (95 % interval {interval})" if interval else ""
    return f"{row.arm.name}: {what}{within}{_sureness(row)}"


def _sureness(row: Row) -> str:
    found = row.comparison
    if found is None or found.main_test is None:
        return ", from one seed: this may be chance"
    told = "told apart from" if row.verdict in {"better", "worse"} else "not told apart from"
    return f"; {told} it {OVER[found.main_test]}, corrected p {p_value(row.p)}"


def _others(best: Row, real: Sequence[Row]) -> list[str]:
    better = sorted((r for r in real if r is not best and r.verdict == "better"), key=_change)
    worse = [row.arm.name for row in real if row.verdict == "worse"]
    said = []
    if better:
        listed = ", ".join(f"{row.arm.name} ({_without_trailing(row)})" for row in better)
        said.append(f"Also better: {listed}.")
    if worse:
        said.append(f"Worse than the baseline: {', '.join(worse)}.")
    return said


def _placebo(row: Row, baseline: str) -> str:
    name = row.arm.name if "placebo" in row.arm.name else f"The placebo {row.arm.name}"
    if row.p is None:
        return f"{name}, from one seed: {_without_trailing(row)}; no verdict."
    if row.verdict == "better":
        return (
            f"{name} gains too ({_without_trailing(row)}): so much of any gain is regularisation "
            "and not "
            "knowledge."
        )
    if row.verdict == "worse":
        return f"{name} hurts ({_without_trailing(row)})."
    return f"{name} is not told apart from {baseline} ({_without_trailing(row)})."


def _without_trailing(row: Row) -> str:
    if row.perplexity_change is not None:
        return f"perplexity {percent(row.perplexity_change)}"
    return f"{format_number(_change(row))} bits per character"


def _limits(others: Sequence[Row]) -> list[str]:
    found = [row.comparison for row in others if row.comparison is not None]
    num_seeds = min(c.num_seeds for c in found)
    said = []
    if num_seeds == 1:
        said.append(
            "An arm has one seed in common with the baseline: for it nothing is said of other "
            "initialisations, its interval is over texts alone, and a small difference means "
            "nothing."
        )
    elif smallest_p(num_seeds) >= 0.05:
        said.append(
            f"With {num_seeds} seeds the test over seeds alone cannot give less than "
            f"p = {smallest_p(num_seeds):.3g}, however large the gain."
        )
    if any(not c.num_texts for c in found):
        said.append("Some runs kept no figures per text: they are compared by seed alone.")
    return said


def _change(row: Row) -> float:
    return row.comparison.change if row.comparison is not None else 0.0


def test_names(found: Sequence[Comparison]) -> list[str]:
    """Tests that at least one comparison could make, the most demanding last."""
    return [test for test in OVER if any(test in comparison.p for comparison in found)]
