"""Every arm against the baseline: paired by seed and by text, tested, corrected for their number.

A measure of a run is a sum over texts divided by a sum of weights, so runs are compared text by
text. Where runs recorded no scores per text, or their texts differ, what remains is pairing by
seed. Effects and shares of texts are signed so that positive is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.config.load import flatten
from kvdistill.studies import statistics
from kvdistill.studies.report.reading import NOT_OF_AN_ARM, Arm, Run, Study
from kvdistill.studies.statistics import Estimate, Interval

TESTS: Final = ("texts", "seeds", "both")
"""Over which units a test generalises: other texts, other seeds, or both."""
CONTROL_NAMES: Final = {
    "initial_student": "the initial student",
    "tokenizer": "the tokenizer",
    "corpus": "the training corpus",
    "evaluation": "the held-out texts",
    "order": "the order of the data",
    "steps": "the number of steps",
}
"""The ``controls`` in a run's record, in words."""


@dataclass(frozen=True)
class Measure:
    """One metric of a run, and each text's contribution to it."""

    metric: str
    value: str
    """Field of a text's scores, in multiples of ``unit``."""
    weight: str
    """Field of a text's scores that weights it, 1 if absent; ``eval_<weight>`` is its total."""
    unit: float = 1.0
    lower_is_better: bool = True

    def of_run(self, run: Run) -> float | None:
        """The measure over all texts of a run."""
        found = run.metrics.get(self.metric)
        return math.log(found) if found is not None and self is LOG_PERPLEXITY else found

    def by_text(self, run: Run) -> dict[str, tuple[float, float]]:
        """Value and weight of every text of a run that has a value and a positive weight."""
        return {
            text: (float(scores[self.value]) / self.unit, scores.get(self.weight, 1.0))
            for text, scores in run.samples.items()
            if scores.get(self.value) is not None and scores.get(self.weight, 1.0) > 0
        }


BITS: Final = Measure("eval_bits_per_character", "nll", "num_chars", math.log(2))
LOG_PERPLEXITY: Final = Measure("eval_perplexity", "nll", "num_tokens")
EXACT_MATCH: Final = Measure("eval_exact_match", "correct", "num_answers", lower_is_better=False)


@dataclass(frozen=True)
class Paired:
    """Differences ``arm - baseline`` of one measure."""

    values_SN: NDArray[np.float64]
    """Per seed and text, ``[S, N]``; one column where texts could not be paired."""
    weights_N: NDArray[np.float64]

    @property
    def has_texts(self) -> bool:
        """Whether texts were paired, and not runs alone."""
        return bool(self.values_SN.shape[1] > 1)

    @property
    def over_seeds(self) -> NDArray[np.float64]:
        """The difference of each seed over all texts, ``[S]``."""
        total: NDArray[np.float64] = self.values_SN.sum(1) / self.weights_N.sum()
        return total

    @property
    def over_texts(self) -> NDArray[np.float64]:
        """Each text's contribution to the difference, mean over seeds, ``[N]``."""
        mean: NDArray[np.float64] = self.values_SN.mean(0)
        return mean


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline in one measure."""

    num_seeds: int
    num_texts: int
    """0 where texts could not be paired."""
    change: Estimate
    p: dict[str, float]
    """By test, those that could be made; uncorrected."""
    corrected: dict[str, float]
    """By test, corrected over the arms by Holm's method."""
    effect_seeds: float
    """Hedges' g over seeds; positive is better, NaN below three seeds."""
    effect_texts: float
    better_texts: float
    """Share of texts on which the arm does better; NaN without texts."""

    @property
    def main_test(self) -> str | None:
        """The most demanding test that could be made; None with a single seed.

        A test over texts alone never decides: it finds an arm different from itself.
        """
        return next((test for test in ("both", "seeds") if test in self.corrected), None)


def compare(study: Study, measure: Measure) -> dict[str, Comparison]:
    """Comparisons by arm, without the baseline and arms that share no seed with it."""
    baseline = study.arm(study.baseline)
    found = {}
    for arm in study.arms:
        pairs = None if arm is baseline else paired(arm, baseline, measure)
        if pairs is not None:
            found[arm.name] = against(pairs, measure)
    by_test = {
        test: statistics.holm({name: c.p[test] for name, c in found.items() if test in c.p})
        for test in TESTS
    }
    return {
        name: replace(c, corrected={test: p[name] for test, p in by_test.items() if name in p})
        for name, c in found.items()
    }


def paired(arm: Arm, baseline: Arm, measure: Measure) -> Paired | None:
    """Differences by seed and text; by seed alone where texts cannot be paired; None without."""
    runs, others = arm.by_seed(), baseline.by_seed()
    pairs = [(runs[seed], others[seed]) for seed in runs if seed in others]
    texts = _common_texts([run for pair in pairs for run in pair], measure)
    if texts:
        rows = []
        for pair in pairs:
            ours, theirs = (measure.by_text(run) for run in pair)
            rows.append([ours[text][0] - theirs[text][0] for text in texts])
        return Paired(np.array(rows), np.array(list(texts.values())))
    total = f"eval_{measure.weight}"
    values = [
        of_arm - of_baseline
        for a, b in pairs
        if a.metrics.get(total) == b.metrics.get(total)
        and (of_arm := measure.of_run(a)) is not None
        and (of_baseline := measure.of_run(b)) is not None
    ]
    return Paired(np.array(values)[:, None], np.ones(1)) if values else None


def against(pairs: Paired, measure: Measure) -> Comparison:
    """One comparison, its p-values not yet corrected."""
    sign = -1 if measure.lower_is_better else 1
    num_seeds, num_texts = pairs.values_SN.shape
    p = {"seeds": statistics.sign_flip(pairs.over_seeds)} if num_seeds > 1 else {}
    better = math.nan
    if pairs.has_texts:
        p["texts"] = statistics.sign_flip(pairs.over_texts)
        better = float(np.mean(sign * pairs.over_texts > 0))
        if num_seeds > 1:
            p["both"] = statistics.crossed_test(pairs.values_SN, pairs.weights_N).p
    interval = statistics.bootstrap(pairs.values_SN, pairs.weights_N)
    return Comparison(
        num_seeds=num_seeds,
        num_texts=num_texts if pairs.has_texts else 0,
        change=Estimate(float(pairs.over_seeds.mean()), interval),
        p=p,
        corrected={},
        effect_seeds=sign * statistics.hedges_g(pairs.over_seeds),
        effect_texts=sign * statistics.hedges_g(pairs.over_texts),
        better_texts=better,
    )


def relative(change: Estimate) -> Estimate:
    """A change of log perplexity as a relative change of perplexity: -0.1 is 10 % lower."""
    found = change.interval
    interval = found and Interval(math.expm1(found.low), math.expm1(found.high))
    return Estimate(math.expm1(change.value), interval)


def _common_texts(runs: Sequence[Run], measure: Measure) -> Mapping[str, float]:
    """Weight of every text that all runs scored with equal weight; empty if too few did.

    Perplexities are comparable where token counts agree, bits per character where characters do.
    """
    if not runs:
        return {}
    first, *others = (measure.by_text(run) for run in runs)
    common = {
        text: weight
        for text, (_, weight) in first.items()
        if all(text in other and other[text][1] == weight for other in others)
    }
    # A few common texts out of many are another evaluation, not a comparison.
    most = max(len(parts) for parts in (first, *others))
    return common if 2 * len(common) > most and len(common) > 1 else {}


def unfair_arms(study: Study) -> list[str]:
    """One note per arm that differs from the baseline, under the same seed, in a control.

    Runs that recorded no controls are compared by their number of steps alone.
    """
    baseline = study.arm(study.baseline).by_seed()
    notes = []
    for arm in study.arms:
        different = {
            name
            for seed, run in arm.by_seed().items()
            if seed in baseline
            for key, name in CONTROL_NAMES.items()
            if _control(run.record, key) != _control(baseline[seed].record, key)
        }
        if different:
            listed = ", ".join(sorted(different))
            notes.append(
                f"arm {arm.name!r} differs from {study.baseline} in {listed}: not a fair comparison"
            )
    return notes


def _control(record: dict[str, Any], key: str) -> Any:
    found = (record.get("controls") or {}).get(key)
    return record["steps"] if key == "steps" and found is None else found


def left_out(study: Study) -> dict[str, Mapping[str, Arm]]:
    """For each arm of several teachers, by teacher, the arm that has all but that one.

    An arm counts only if everything but its teachers and their weights is equal: otherwise the
    difference is not the teacher's alone. Placebos are left aside.
    """
    real = [arm for arm in study.arms if not arm.placebo and arm.teachers]
    found: dict[str, Mapping[str, Arm]] = {}
    for full in real:
        without = {
            teacher: arm
            for teacher in full.teachers
            for arm in real
            if set(arm.teachers) == set(full.teachers) - {teacher}
            and _besides_teachers(arm) == _besides_teachers(full)
        }
        if len(full.teachers) > 1 and without:
            found[full.name] = without
    return found


def _besides_teachers(arm: Arm) -> dict[str, Any]:
    settings = {key: value for key, value in arm.config.items() if key not in NOT_OF_AN_ARM}
    return {
        key: value
        for key, value in flatten(settings).items()
        if not key.startswith(("teachers.", "fusion.weights"))
    }
