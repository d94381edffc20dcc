"""What runs are compared by, text by text: each a sum over texts, divided by a sum of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.config.load import flatten
from kvdistill.studies import statistics
from kvdistill.studies.report.reading import NOT_OF_AN_ARM, Arm, Run, SampleScore, Study
from kvdistill.studies.statistics import Interval


@dataclass(frozen=True)
class Measure:
    """One figure of a run: its key among the metrics, and how each text adds to it."""

    key: str
    label: str
    lower_is_better: bool
    weight: str
    """Metric that must be the same where two runs are to be compared as wholes."""

    def parts(self, score: SampleScore) -> tuple[float, float] | None:
        """Value and weight of one text, or None if it has none."""
        if self.key == BITS.key:
            return score.nll / math.log(2), score.num_chars
        if self.key == LOG_PERPLEXITY.key:
            return score.nll, score.num_tokens
        return None if score.correct is None else (float(score.correct), 1.0)

    def of_run(self, metrics: dict[str, Any]) -> float | None:
        """The figure of a whole run, from its metrics."""
        if self.key == LOG_PERPLEXITY.key:
            perplexity = metrics.get("eval_perplexity")
            return None if perplexity is None else math.log(perplexity)
        return metrics.get(self.key)


BITS: Final = Measure("eval_bits_per_character", "bits per character", True, "eval_num_chars")


LOG_PERPLEXITY: Final = Measure("log_perplexity", "log perplexity", True, "eval_num_tokens")


EXACT_MATCH: Final = Measure("eval_exact_match", "exact match", False, "eval_num_answers")


TESTS: Final = ("texts", "seeds", "both")
"""What a p-value speaks of: other texts, other seeds, or both."""


@dataclass(frozen=True)
class Paired:
    """Differences ``arm - baseline`` of one measure."""

    seeds: tuple[int, ...]
    values_SN: NDArray[np.float64]
    """Per seed and text; one column where nothing is known of single texts."""
    weights_N: NDArray[np.float64]

    @property
    def has_texts(self) -> bool:
        """Whether texts were paired, and not runs alone."""
        return bool(self.values_SN.shape[1] > 1)

    @property
    def over_seeds(self) -> NDArray[np.float64]:
        """The difference of each seed, over all texts."""
        total: NDArray[np.float64] = self.values_SN.sum(1) / self.weights_N.sum()
        return total

    @property
    def over_texts(self) -> NDArray[np.float64]:
        """What each text adds to the difference, the mean over seeds."""
        mean: NDArray[np.float64] = self.values_SN.mean(0)
        return mean


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline in one measure."""

    arm: str
    num_seeds: int
    num_texts: int
    """0 where texts could not be paired."""
    change: float
    interval: Interval | None
    """Of the change, 95 %."""
    p: dict[str, float]
    """By test, those that could be made; not corrected."""
    corrected: dict[str, float]
    """By test, corrected over the arms by Holm's method."""
    effect_seeds: float
    """Hedges' g over seeds; positive is better, NaN below three seeds."""
    effect_texts: float
    better_texts: float
    """Share of texts on which the arm does better; NaN without texts."""

    @property
    def main_test(self) -> str | None:
        """The most demanding test that could be made, None where one seed is all there is.

        A test over texts alone is never enough: an arm "differs" from itself over texts.
        """
        return next((test for test in ("both", "seeds") if test in self.corrected), None)


def compare(study: Study, measure: Measure) -> dict[str, Comparison]:
    """Comparisons of all arms but the baseline, by name; arms that share no seed are left out."""
    baseline = study.arm(study.baseline)
    found = {}
    for arm in study.arms:
        pairs = None if arm is baseline else paired(arm, baseline, measure)
        if pairs is not None:
            found[arm.name] = against(arm.name, pairs, measure)
    for test in TESTS:
        corrected = statistics.holm({name: c.p[test] for name, c in found.items() if test in c.p})
        found = {
            name: replace(c, corrected=c.corrected | {test: corrected[name]})
            if name in corrected
            else c
            for name, c in found.items()
        }
    return found


def paired(arm: Arm, baseline: Arm, measure: Measure) -> Paired | None:
    """Differences by seed and text; by seed alone where texts cannot be paired; None without."""
    runs, others = arm.by_seed(), baseline.by_seed()
    seeds = tuple(seed for seed in runs if seed in others)
    pairs = [(runs[seed], others[seed]) for seed in seeds]
    texts = _common_texts([run for pair in pairs for run in pair], measure)
    if texts:
        rows = [_values(a, texts, measure) - _values(b, texts, measure) for a, b in pairs]
        return Paired(seeds, np.stack(rows), np.array(list(texts.values())))
    known = [
        (seed, ours - theirs)
        for seed, (a, b) in zip(seeds, pairs, strict=True)
        if a.metrics.get(measure.weight) == b.metrics.get(measure.weight)
        and (ours := measure.of_run(a.metrics)) is not None
        and (theirs := measure.of_run(b.metrics)) is not None
    ]
    if not known:
        return None
    kept, values = zip(*known, strict=True)
    return Paired(kept, np.array(values)[:, None], np.ones(1))


def against(name: str, pairs: Paired, measure: Measure) -> Comparison:
    """One comparison, its p-values not corrected."""
    sign = -1 if measure.lower_is_better else 1
    num_seeds, num_texts = pairs.values_SN.shape
    p = {"seeds": statistics.sign_flip(pairs.over_seeds)} if num_seeds > 1 else {}
    better = math.nan
    if pairs.has_texts:
        p["texts"] = statistics.sign_flip(pairs.over_texts)
        better = float(np.mean(sign * pairs.over_texts > 0))
        if num_seeds > 1:
            p["both"] = statistics.crossed_test(pairs.values_SN, pairs.weights_N).p
    return Comparison(
        arm=name,
        num_seeds=num_seeds,
        num_texts=num_texts if pairs.has_texts else 0,
        change=float(pairs.over_seeds.mean()),
        interval=statistics.bootstrap(pairs.values_SN, pairs.weights_N),
        p=p,
        corrected={},
        effect_seeds=sign * statistics.hedges_g(pairs.over_seeds),
        effect_texts=sign * statistics.hedges_g(pairs.over_texts),
        better_texts=better,
    )


def relative(change: float) -> float:
    """A change of log perplexity as a share of perplexity: -0.1 is 10 % lower."""
    return math.expm1(change)


def _common_texts(runs: Sequence[Run], measure: Measure) -> Mapping[str, float]:
    """Weight of every text that all runs scored alike; empty where they did not.

    Perplexities compare where tokens agree, bits per character where characters do.
    """
    if not runs:
        return {}
    scored = [_parts(run, measure) for run in runs]
    first, *others = scored
    common = {text: weight for text, (_, weight) in first.items()}
    for other in others:
        common = {
            text: weight
            for text, weight in common.items()
            if text in other and other[text][1] == weight
        }
    # A handful of agreeing texts out of many is another evaluation, not a comparison.
    most = max(len(parts) for parts in scored)
    return common if 2 * len(common) > most and len(common) > 1 else {}


def _values(run: Run, texts: Mapping[str, float], measure: Measure) -> NDArray[np.float64]:
    found = _parts(run, measure)
    return np.array([found[text][0] for text in texts])


def _parts(run: Run, measure: Measure) -> dict[str, tuple[float, float]]:
    """Value and weight of every text that has them; texts that predict nothing are left out."""
    found = {text: measure.parts(score) for text, score in run.samples.items()}
    return {text: part for text, part in found.items() if part is not None and part[1] > 0}


SAID: Final = {
    "initial_student": "another initial student",
    "tokenizer": "another tokenizer",
    "corpus": "another training corpus",
    "evaluation": "other held-out texts",
    "order": "another order of the data",
    "steps": "another number of steps",
}
"""The ``controls`` that a run writes into its record, as words."""


def unequal(study: Study) -> list[str]:
    """One note per arm that differs from the baseline, under the same seed, in what it should not.

    Runs that recorded no controls are judged by their number of steps alone.
    """
    baseline = study.arm(study.baseline).by_seed()
    notes = []
    for arm in study.arms:
        different = {
            said
            for seed, run in arm.by_seed().items()
            if seed in baseline
            for key, said in SAID.items()
            if _control(run.record, key) != _control(baseline[seed].record, key)
        }
        if different:
            listed = ", ".join(sorted(different))
            notes.append(f"arm {arm.name!r} had {listed} than {study.baseline}: no fair comparison")
    return notes


def _control(record: dict[str, object], key: str) -> str:
    controls = record.get("controls")
    found = controls.get(key) if isinstance(controls, dict) else None
    return json.dumps(record["steps"] if key == "steps" and found is None else found)


def left_out(study: Study) -> dict[str, Mapping[str, Arm]]:
    """For each arm of several teachers, by teacher, the arm that has all but that one.

    An arm counts only if everything but its teachers and their weights is set alike: otherwise
    the difference would not be the teacher's. Placebos have no teachers to leave out.
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


def _besides_teachers(arm: Arm) -> str:
    settings = {key: value for key, value in arm.config.items() if key not in NOT_OF_AN_ARM}
    flat = {
        key: value
        for key, value in flatten(settings).items()
        if not key.startswith(("teachers.", "fusion.weights"))
    }
    return json.dumps(flat, sort_keys=True)


# MERGED-DOC pipelines.report.compare
# Every arm against the baseline: paired by seed and by text, three tests, corrected for number.
#
# Signs are turned so that a positive gain or effect is the arm doing better. Where runs kept no
# figures per text (or their texts or characters differ), what remains is pairing by seed.


# MERGED-DOC pipelines.report.fairness
# Whether the runs of one seed held equal what a fair comparison holds equal.


# MERGED-DOC pipelines.report.left_out
# Leave one teacher out: arms of a study that differ in nothing but one teacher.
