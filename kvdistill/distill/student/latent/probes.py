"""Diagnostics of latents: are they load-bearing, and what can be read off them?

Tampering changes what the answer attends to: the latents' unrotated keys and values, in every
layer. If answers survive zeros, another order or another sample's latents, the latents carry
nothing that the answer uses, whatever the accuracy.

``zeroed``    keys and values are zero
``shuffled``  the latents' positions are permuted, equally in every layer
``swapped``   each sample gets the latents of the next one in its batch

A linear probe shows whether an intermediate result is linearly decodable from a latent, not that
the answer uses it. Its accuracy is to be compared with that of guessing the most frequent value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.attention.kv_capture import KVCapture
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import is_gradable
from kvdistill.distill.evaluate.held_out import HeldOut, latent_exact_match
from kvdistill.distill.student.latent.model import LatentStudent, Think, Thought, left_padded
from kvdistill.distill.student.latent.questions import question_and_answer
from kvdistill.errors import CorpusError, StudentError
from kvdistill.types import Kind

RESULT: Final = re.compile(r"=\s*\$?(-?\d[\d,]*(?:\.\d+)?)")

RIDGE: Final = 1e-2
"""Penalty of a probe, relative to its features' mean variance."""

MIN_SAMPLES: Final = 20
"""Steps that occur in fewer samples are not probed."""

Tamper = Callable[[Tensor], Tensor]
"""From the latents' keys or values ``[B, H, M, D]`` to those that the answer attends to."""


def _shuffled(x_BHMD: Tensor) -> Tensor:
    order = torch.randperm(x_BHMD.shape[2], generator=torch.Generator().manual_seed(0))
    return x_BHMD[:, :, order.to(x_BHMD.device)]


TAMPERINGS: Final[dict[str, Tamper]] = {
    "zeroed": torch.zeros_like,
    "shuffled": _shuffled,
    "swapped": lambda x_BHMD: x_BHMD.roll(1, dims=0),
}


@dataclass(frozen=True, eq=False)
class Latents:
    """The latents of every sample, after the last layer."""

    hidden_NME: Tensor
    nearest_NMK: Tensor
    """Ids of the three likeliest tokens under the language-model head, best first."""


@dataclass(frozen=True)
class Probes:
    """Accuracy of linear probes for the intermediate results."""

    accuracy: list[list[float]]
    """Per latent and step: share of held-out samples whose result is predicted."""
    commonest: list[float]
    """Per step: accuracy of guessing the most frequent result, on the same samples."""


def diagnose_latents(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    found: HeldOut,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> HeldOut:
    """Add tampering, probes and nearest tokens to an evaluation.

    ``exact_match_zeroed``, ``…_shuffled``, ``…_swapped``   exact match under each tampering
    ``probe_<step>``       accuracy of the best latent's probe for a step's result
    ``commonest_<step>``   accuracy of guessing; both only where rationales have equations
    Rows get ``nearest_tokens``: per latent its three likeliest tokens, best first.

    Raises:
        StudentError: there are no latents.
    """
    gradable = [sample for sample in samples if is_gradable(sample)]
    shares = tamper_with(
        student, tokenizer, gradable, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    metrics = found.metrics | {f"exact_match_{name}": share for name, share in shares.items()}
    latents = read_latents(student, tokenizer, gradable, batch_size=batch_size)
    if sum(bool(intermediate_results(sample)) for sample in gradable) >= MIN_SAMPLES:
        probes = probe(latents, gradable)
        for step, commonest in enumerate(probes.commonest, start=1):
            best = max(row[step - 1] for row in probes.accuracy)
            metrics |= {f"probe_{step}": best, f"commonest_{step}": commonest}
    nearest = {
        sample.sample_id: [tokenizer.batch_decode(ids.unsqueeze(-1)) for ids in row]
        for sample, row in zip(gradable, latents.nearest_NMK, strict=True)
    }
    rows = [row | {"nearest_tokens": nearest[row["sample_id"]]} for row in found.rows]
    return HeldOut(metrics, rows)


def tamper_with(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, float]:
    """Exact match under every tampering, by its name.

    Raises:
        StudentError: there are no latents to tamper with.
        CorpusError: a sample has no prompt or no answer.
    """
    if not student.config.positions:
        raise StudentError("a student with latent.method none has no latents to tamper with")
    return {
        name: latent_exact_match(
            student,
            tokenizer,
            samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            think=tampered(student, tamper),
        ).share
        for name, tamper in TAMPERINGS.items()
    }


def tampered(student: LatentStudent, tamper: Tamper) -> Think:
    """The student's forward pass, with the latents' keys and values tampered with."""
    capture = KVCapture(student.backbone)

    def think(question_BT: Tensor, mask_BT: Tensor) -> Thought:
        prefix, x_BME = student.think(question_BT, mask_BT)
        with capture() as captured:
            thought = student.conclude(prefix, x_BME)
        columns = thought.columns

        def rewrite(x_BHTD: Tensor, layer: int, kind: Kind) -> Tensor:
            out = x_BHTD.clone()
            out[:, :, columns] = tamper(getattr(captured[layer], kind)[:, :, columns])
            return out

        with capture.rewriting(rewrite):
            return student.conclude(prefix, x_BME)

    return think


@torch.inference_mode()
def read_latents(
    student: LatentStudent, tokenizer: Any, samples: Sequence[Sample], *, batch_size: int
) -> Latents:
    """Run a student on every question and collect its latents, in the samples' order.

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
        # Soft caps and scales do not change the order.
        logits = student.backbone.get_output_embeddings()(thought.latents)
        nearest.append(logits.topk(3, dim=-1).indices.cpu())
    student.train(was_training)
    return Latents(torch.cat(hidden), torch.cat(nearest))


def intermediate_results(sample: Sample) -> list[str]:
    """Results of the rationale's steps, in order: the numbers after its equal signs."""
    rationale = dict(sample.segments).get("rationale", "")
    return [found.replace(",", "") for found in RESULT.findall(rationale)]


def probe(latents: Latents, samples: Sequence[Sample]) -> Probes:
    """Fit one linear probe per latent and step on every other sample, and score it on the rest.

    Only held-out samples whose result occurs among the fitted ones are scored.

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
        fitted, held_out = values[::2], values[1::2]
        classes = sorted(set(fitted))
        scored = [k for k, value in enumerate(held_out) if value in classes]
        if not scored:
            break
        labels = torch.tensor([classes.index(value) for value in fitted])
        expected = torch.tensor([classes.index(held_out[k]) for k in scored])
        hidden = latents.hidden_NME[rows]
        accuracy.append(
            [
                _accuracy(hidden[::2, m], labels, hidden[1::2, m][scored], expected, len(classes))
                for m in range(num_latents)
            ]
        )
        guess = Counter(fitted).most_common(1)[0][0]
        commonest.append(sum(held_out[k] == guess for k in scored) / len(scored))
    if not accuracy:
        raise CorpusError(
            f"probes: expected at least {MIN_SAMPLES} samples with equations (such as 3+4=7) in "
            f"their rationales, got {sum(bool(r) for r in results)} of {len(samples)}; use more"
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
