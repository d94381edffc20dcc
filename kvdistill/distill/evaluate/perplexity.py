"""Likelihood of held-out text under a student: perplexity, bits per character, calibration.

Perplexity depends on the tokenizer, so it compares students that share one. Bits per character do
not: a text has the same characters whatever its tokens are. Every sample keeps its own figures,
since students are best compared sample by sample. The expected calibration error is the mean gap
between confidence and accuracy of the next token (Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.language_head import DeferredLogits, LanguageHead
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import (
    StudentTokens,
    padded,
    require_text,
    scored_tokens,
    student_batch,
    tokenize,
)
from kvdistill.distill.evaluate.over_ranks import over_ranks
from kvdistill.distill.losses.pointwise import IGNORED_LABEL, negative_log_likelihood

CALIBRATION_BINS: Final = 15


@dataclass(frozen=True)
class TextScore:
    """Likelihood of one text, of a conversation the assistant's turns; without BOS and EOS."""

    sample_id: str
    nll: float
    """Negative log-likelihood of the predicted tokens, nats."""
    num_tokens: int
    num_chars: int
    """Characters that the predicted tokens span."""


@dataclass(frozen=True)
class Metrics:
    """Scores of a set of texts, in their order."""

    samples: tuple[TextScore, ...]
    calibration: Calibration

    def to_dict(self) -> dict[str, float]:
        """Figures over all texts (``nll`` in nats) and the counts behind them."""
        nll = math.fsum(sample.nll for sample in self.samples)
        num_tokens = sum(sample.num_tokens for sample in self.samples)
        num_chars = sum(sample.num_chars for sample in self.samples)
        return {
            "perplexity": math.exp(min(nll / max(num_tokens, 1), 700.0)),
            "bits_per_character": nll / math.log(2) / max(num_chars, 1),
            "calibration_error": self.calibration.error,
            "nll": nll,
            "num_tokens": num_tokens,
            "num_chars": num_chars,
            "num_samples": len(self.samples),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready object per text."""
        return [asdict(sample) for sample in self.samples]


def by_task(metrics: Metrics, tasks: Sequence[str | None]) -> dict[str, float]:
    """Bits per character of every task, and their unweighted mean ``bits_per_character_macro``.

    Empty for texts of one task: the mean over tasks then is the mean over texts. ``tasks`` are in
    the order of ``metrics.samples``.
    """
    names = sorted({task for task in tasks if task is not None})
    if len(names) < 2:
        return {}
    found = {}
    for name in names:
        chosen = [text for text, task in zip(metrics.samples, tasks, strict=True) if task == name]
        nll = math.fsum(text.nll for text in chosen)
        num_chars = sum(text.num_chars for text in chosen)
        found[f"bits_per_character/{name}"] = nll / math.log(2) / max(num_chars, 1)
    return found | {"bits_per_character_macro": math.fsum(found.values()) / len(found)}


@torch.inference_mode()
def score_texts(
    student: Any, tokenizer: Any, samples: Sequence[Sample], *, max_length: int, batch_size: int
) -> Metrics:
    """Score texts under a transformers causal LM, on its device.

    ``max_length`` counts special tokens too; the rest of a text is truncated and not counted.

    Raises:
        CorpusError: no text has a token to score.
    """
    require_text(tokenizer, samples, max_length)
    was_training = student.training
    student.eval()
    device = student.get_input_embeddings().weight.device
    head = LanguageHead(student)
    pad_id = tokenizer.pad_token_id or 0

    def score(chosen: list[int]) -> tuple[list[TextScore], Tensor]:
        texts = [samples[i] for i in chosen]
        tokens = tokenize(tokenizer, texts, max_length)
        batch = student_batch(tokens, pad_id)
        counted = [scored_tokens(*pair) for pair in zip(texts, tokens, strict=True)]
        mask = padded(counted, 0, batch["labels"].shape[1]).bool()
        labels = batch["labels"].masked_fill(~mask, IGNORED_LABEL)[:, 1:].to(device)
        wanted = F.pad(labels, (0, 1), value=IGNORED_LABEL)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        _, logits = head.run(**inputs, use_cache=False)
        calibration = Calibration(device)

        def measured(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
            calibration.add(logits_NV, labels_N)
            return negative_log_likelihood(logits_NV, labels_N)

        if isinstance(logits, DeferredLogits):
            nll_BT = logits.map(measured, wanted)
        else:
            nll_BT = measured(logits.flatten(0, 1), wanted.flatten()).view_as(wanted)
        nll = nll_BT.sum(1, dtype=torch.float64).tolist()
        counts = (labels != IGNORED_LABEL).sum(1).tolist()
        rows = zip(texts, nll, counts, map(_num_chars, tokens, counted), strict=True)
        scores = [TextScore(sample.sample_id, *figures) for sample, *figures in rows]
        return scores, calibration.sums.cpu()

    # Texts of similar length share a batch, to save padding; totals do not depend on the order.
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].text))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = over_ranks(student, batches, score)
    student.train(was_training)
    of_sample = {
        i: text
        for chosen, (scores, _) in zip(batches, found, strict=True)
        for i, text in zip(chosen, scores, strict=True)
    }
    calibration = Calibration(torch.device("cpu"))
    calibration.sums += sum((sums for _, sums in found), torch.zeros_like(calibration.sums))
    return Metrics(tuple(of_sample[i] for i in range(len(samples))), calibration)


class Calibration:
    """Confidence and accuracy of next-token predictions, summed per bin of confidence."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add tokens: logits ``[N, V]``, labels ``[N]``."""
        mask = labels != IGNORED_LABEL
        log_probability, guess = logits[mask].float().log_softmax(-1).max(-1)
        confidence = log_probability.exp().double()
        right = (guess == labels[mask]).double()
        bin_idx = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
        for row, value in enumerate((torch.ones_like(confidence), confidence, right)):
            self.sums[row].index_add_(0, bin_idx, value)

    @property
    def error(self) -> float:
        """Expected calibration error: mean over tokens of |confidence − accuracy| of their bin."""
        num, confidence, right = self.sums
        return float((confidence - right).abs().sum() / num.sum().clamp_min(1))

    @property
    def bins(self) -> list[dict[str, float]]:
        """``num_tokens``, ``confidence`` and ``accuracy`` of non-empty bins, by confidence."""
        return [
            {"num_tokens": int(num), "confidence": confidence / num, "accuracy": right / num}
            for num, confidence, right in self.sums.T.tolist()
            if num
        ]


def _num_chars(tokens: StudentTokens, counted: NDArray[np.int64]) -> int:
    """Characters that the counted tokens span, run by run."""
    edges = np.flatnonzero(np.diff(counted[1:], prepend=0, append=0)) + 1
    runs = zip(edges[::2], edges[1::2], strict=True)
    return sum(int(tokens.char_end[a:b].max() - tokens.char_start[a:b].min()) for a, b in runs)
