"""What can be read off the latents: intermediate results by linear probes, nearest tokens.

A probe says whether a result is *there* in a form that one linear map can read; it does not say
that the answer uses it (that is what tampering is for). Its accuracy means something only against
the share of the commonest value, which is given beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.corpus import Sample
from kvdistill.distill.latent.collate import question_and_answer
from kvdistill.distill.latent.generation import left_padded
from kvdistill.distill.latent.student import LatentStudent
from kvdistill.errors import CorpusError

RESULT: Final = re.compile(r"=\s*\$?(-?\d[\d,]*(?:\.\d+)?)")
RIDGE: Final = 1e-2
"""Penalty of a probe, as a share of its features' mean variance."""
MIN_SAMPLES: Final = 20
"""Steps that fewer samples have are not probed."""


@dataclass(frozen=True, eq=False)
class Latents:
    """The latents of every sample, after the last layer."""

    hidden_NME: Tensor
    nearest_NMK: Tensor
    """Ids of the likeliest tokens, best first, where the language model's head reads a latent."""


@dataclass(frozen=True)
class Probes:
    """How well the result of a step can be read off a latent."""

    accuracy: list[list[float]]
    """Per latent and step: share of held-out samples whose result the probe gets right."""
    commonest: list[float]
    """Per step: what guessing the commonest result would score on the same samples."""


@torch.inference_mode()
def read_latents(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    num_nearest: int = 3,
) -> Latents:
    """Let a student think about every question, and keep what it thought.

    Raises:
        CorpusError: a sample has no prompt or no answer.
    """
    was_training = student.training
    student.eval()
    device = student.get_input_embeddings().weight.device
    hidden, nearest = [], []
    for start in range(0, len(samples), batch_size):
        questions = [question_and_answer(s)[0] for s in samples[start : start + batch_size]]
        ids, mask = left_padded(tokenizer, questions)
        thought = student(ids.to(device), mask.to(device))
        hidden.append(thought.latents.float().cpu())
        logits = thought.run.output.logits[:, thought.columns]
        nearest.append(logits.topk(num_nearest, dim=-1).indices.cpu())
    student.train(was_training)
    return Latents(torch.cat(hidden), torch.cat(nearest))


def intermediate_results(sample: Sample) -> list[str]:
    """What the rationale's steps come to, in order: the numbers after its equal signs."""
    rationale = dict(sample.segments).get("rationale", "")
    return [found.replace(",", "") for found in RESULT.findall(rationale)]


def probe(latents: Latents, samples: Sequence[Sample]) -> Probes:
    """Fit one linear probe per latent and step on every other sample, score it on the rest.

    Held-out samples count whose result occurs among the fitted ones; it cannot be learned else.

    Raises:
        CorpusError: too few samples have equations in their rationales.
    """
    results = [intermediate_results(sample) for sample in samples]
    num_latents, accuracy, commonest = latents.hidden_NME.shape[1], [], []
    for step in range(max((len(r) for r in results), default=0)):
        rows = [i for i, found in enumerate(results) if len(found) > step]
        if len(rows) < MIN_SAMPLES:
            break
        values = [results[i][step] for i in rows]
        fitted, tested = values[::2], values[1::2]
        classes = sorted(set(fitted))
        known = [k for k, value in enumerate(tested) if value in classes]
        if not known:
            break
        labels = torch.tensor([classes.index(value) for value in fitted])
        wanted = torch.tensor([classes.index(tested[k]) for k in known])
        hidden = latents.hidden_NME[rows]
        accuracy.append(
            [
                _accuracy(hidden[::2, m], labels, hidden[1::2, m][known], wanted, len(classes))
                for m in range(num_latents)
            ]
        )
        guess = Counter(fitted).most_common(1)[0][0]
        commonest.append(sum(tested[k] == guess for k in known) / len(known))
    if not accuracy:
        raise CorpusError(
            f"probes need at least {MIN_SAMPLES} samples with equations (such as 3+4=7) in their "
            f"rationales; of {len(samples)} samples {sum(bool(r) for r in results)} have any"
        )
    return Probes([list(latent) for latent in zip(*accuracy, strict=True)], commonest)


def _accuracy(
    fit_NE: Tensor, fit_labels: Tensor, test_NE: Tensor, test_labels: Tensor, num_classes: int
) -> float:
    """Ridge regression onto one-hot labels, in closed form; the largest output is the guess."""
    mean = fit_NE.mean(0)
    x, target = (fit_NE - mean).double(), torch.eye(num_classes).double()[fit_labels]
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    weight = torch.linalg.solve(gram + penalty * torch.eye(gram.shape[0]), x.T @ target)
    scores = (test_NE - mean).double() @ weight + target.mean(0)
    return float((scores.argmax(1) == test_labels).double().mean())
