"""How well a student predicts text: perplexity per token, and bits per character.

Perplexity depends on the tokenizer, so it compares students that share one. Bits per character
do not: the same text has the same characters whatever cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kvdistill.corpus import Sample
from kvdistill.distill.data.collate import IGNORED_LABEL, student_batch
from kvdistill.distill.data.tokens import tokenize


@dataclass(frozen=True)
class Metrics:
    """Totals over a set of texts; special tokens (BOS, EOS) are not counted."""

    nll: float
    """Negative log-likelihood of all predicted tokens, nats."""
    num_tokens: int
    num_chars: int
    """Characters that the predicted tokens stand for."""
    num_samples: int

    @property
    def perplexity(self) -> float:
        """Exponential of the negative log-likelihood per token."""
        return math.exp(min(self.nll / max(self.num_tokens, 1), 700.0))

    @property
    def bits_per_character(self) -> float:
        """Bits of negative log-likelihood, per character of text."""
        return self.nll / math.log(2) / max(self.num_chars, 1)

    def to_dict(self) -> dict[str, float]:
        """The two figures and what they were taken over, for logs and JSON."""
        return {
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
            "nll": self.nll,
            "num_tokens": self.num_tokens,
            "num_chars": self.num_chars,
            "num_samples": self.num_samples,
        }


@torch.inference_mode()
def evaluate(
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
    nll, num_tokens, num_chars = 0.0, 0, 0
    # Texts of like length together waste less padding; totals do not depend on the order.
    ordered = sorted(samples, key=lambda sample: len(sample.text))
    for start in range(0, len(ordered), batch_size):
        tokens = tokenize(tokenizer, ordered[start : start + batch_size], max_length)
        batch = student_batch(tokens, tokenizer.pad_token_id or 0)
        labels = batch["labels"].masked_fill(~batch["text_mask"], IGNORED_LABEL)[:, 1:].to(device)
        logits = student(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            use_cache=False,
        ).logits
        errors = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2),
            labels,
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        nll += float(errors)
        num_tokens += int((labels != IGNORED_LABEL).sum())
        for row in tokens:
            text = row.segment[1:] >= 0
            if text.any():
                num_chars += int(row.char_end[1:][text].max() - row.char_start[1:][text].min())
    student.train(was_training)
    return Metrics(nll, num_tokens, num_chars, len(samples))
