"""What runs are compared by, text by text: each a sum over texts, divided by a sum of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from kvdistill.pipelines.report.study import SampleScore


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
