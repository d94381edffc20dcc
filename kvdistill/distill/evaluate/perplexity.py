"""How well a student predicts text: perplexity, bits per character, calibration.

Perplexity depends on the tokenizer, so it compares students that share one. Bits per character
do not: the same text has the same characters whatever cuts it. Every sample keeps its own
figures, since two students are best compared text by text. The expected calibration error says
whether a student is right as often as it is sure (Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import StudentTokens, student_batch, tokenize
from kvdistill.distill.losses.pointwise import IGNORED_LABEL

CALIBRATION_BINS: Final = 15


@dataclass(frozen=True)
class TextScore:
    """One text."""

    sample_id: str
    nll: float
    """Negative log-likelihood of the predicted tokens, nats."""
    num_tokens: int
    num_chars: int
    """Characters that the predicted tokens stand for."""


@dataclass(frozen=True)
class CalibrationBin:
    """Tokens that a student predicted with like confidence."""

    num_tokens: int
    confidence: float
    """Mean probability of the likeliest token."""
    accuracy: float
    """How often that was the right one."""


@dataclass(frozen=True)
class Metrics:
    """Scores of a set of texts, in their order; special tokens (BOS, EOS) are not counted."""

    samples: tuple[TextScore, ...]
    calibration_error: float
    """Expected calibration error of the next token, over 15 bins of confidence."""
    calibration: tuple[CalibrationBin, ...] = ()
    """The bins that hold tokens, by ascending confidence."""

    @property
    def nll(self) -> float:
        """Negative log-likelihood of all predicted tokens, nats."""
        return math.fsum(sample.nll for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        """Predicted tokens of all texts."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def num_chars(self) -> int:
        """Characters that these stand for."""
        return sum(sample.num_chars for sample in self.samples)

    @property
    def perplexity(self) -> float:
        """Exponential of the negative log-likelihood per token."""
        return math.exp(min(self.nll / max(self.num_tokens, 1), 700.0))

    @property
    def bits_per_character(self) -> float:
        """Bits of negative log-likelihood, per character of text."""
        return self.nll / math.log(2) / max(self.num_chars, 1)

    def to_dict(self) -> dict[str, float]:
        """The figures and what they were taken over, for logs and JSON."""
        return {
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
            "calibration_error": self.calibration_error,
            "nll": self.nll,
            "num_tokens": self.num_tokens,
            "num_chars": self.num_chars,
            "num_samples": len(self.samples),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready object per text."""
        return [asdict(sample) for sample in self.samples]


@torch.inference_mode()
def score_texts(
    student: Any, tokenizer: Any, samples: Sequence[Sample], *, max_length: int, batch_size: int
) -> Metrics:
    """Score texts with a student, on the device it is on.

    Args:
        student: a transformers causal LM.
        tokenizer: its tokenizer.
        samples: held-out texts.
        max_length: tokens per text, special ones included; the rest is cut off and not counted.
        batch_size: texts per forward pass.
    """
    was_training = student.training
    student.eval()
    device = student.get_input_embeddings().weight.device
    scores: list[TextScore | None] = [None] * len(samples)
    calibration = _Calibration(device)
    # Texts of like length together waste less padding; totals do not depend on the order.
    ordered = sorted(range(len(samples)), key=lambda i: len(samples[i].text))
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        tokens = tokenize(tokenizer, [samples[i] for i in chosen], max_length)
        batch = student_batch(tokens, tokenizer.pad_token_id or 0)
        labels = batch["labels"].masked_fill(~batch["text_mask"], IGNORED_LABEL)[:, 1:].to(device)
        logits = student(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            use_cache=False,
        ).logits[:, :-1]
        nll = _nll(logits, labels).sum(1, dtype=torch.float64).tolist()
        calibration.add(logits, labels)
        counts = (labels != IGNORED_LABEL).sum(1).tolist()
        for row, i in enumerate(chosen):
            chars = _num_chars(tokens[row])
            scores[i] = TextScore(samples[i].sample_id, nll[row], counts[row], chars)
    student.train(was_training)
    found = tuple(score for score in scores if score is not None)
    return Metrics(found, calibration.error, calibration.bins)


class _Calibration:
    """Confidence and accuracy of next-token predictions, summed per bin of confidence."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: ``[B, T, V]`` against ``[B, T]``."""
        wanted = labels != IGNORED_LABEL
        log_probability, guess = logits[wanted].float().log_softmax(-1).max(-1)
        confidence = log_probability.exp().double()
        right = (guess == labels[wanted]).double()
        place = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
        for row, value in enumerate((torch.ones_like(confidence), confidence, right)):
            self._sums[row].index_add_(0, place, value)

    @property
    def error(self) -> float:
        """Mean over tokens of |confidence - accuracy| of their bin."""
        num, confidence, right = self._sums
        return float((confidence - right).abs().sum() / num.sum().clamp_min(1))

    @property
    def bins(self) -> tuple[CalibrationBin, ...]:
        """Bins that hold tokens."""
        return tuple(
            CalibrationBin(int(num), confidence / num, right / num)
            for num, confidence, right in self._sums.T.tolist()
            if num
        )


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Per token ``[B, T]``, float32, zero where there is no label."""
    return F.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )


def _num_chars(tokens: StudentTokens) -> int:
    text = tokens.segment[1:] >= 0
    if not text.any():
        return 0
    return int(tokens.char_end[1:][text].max() - tokens.char_start[1:][text].min())
