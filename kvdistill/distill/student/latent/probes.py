"""Are the latents load-bearing? What becomes of the answers when they are tampered with.

Tampering happens where the answer looks: at the latents' keys and values, before rotation, in
every layer. A student whose answers survive zeros, another order or another sample's latents has
them for decoration, whatever its accuracy.

``zeroed``    keys and values are zero
``shuffled``  the latents' positions are permuted, the same way in every layer
``swapped``   each sample gets the latents of the next one in its batch
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

Tamper = Callable[[Tensor], Tensor]
"""From the latents' keys or values ``[B, H, M, D]`` to what the answer sees of them."""


def _shuffled(x_BHMD: Tensor) -> Tensor:
    order = torch.randperm(x_BHMD.shape[2], generator=torch.Generator().manual_seed(0))
    return x_BHMD[:, :, order.to(x_BHMD.device)]


TAMPERINGS: Final[dict[str, Tamper]] = {
    "zeroed": torch.zeros_like,
    "shuffled": _shuffled,
    "swapped": lambda x_BHMD: x_BHMD.roll(1, dims=0),
}


def tampered(student: LatentStudent, tamper: Tamper) -> Think:
    """A way of thinking whose latents are tampered with before the answer sees them."""
    capture = KVCapture(student.backbone)

    def think(question_BT: Tensor, mask_BT: Tensor) -> Thought:
        prefix, x_BME = student.think(question_BT, mask_BT)
        with capture() as captured:
            thought = student.conclude(prefix, x_BME)
        columns = thought.columns
        own = [(tamper(layer.key[:, :, columns]), tamper(layer.value[:, :, columns]))
               for layer in captured]  # fmt: skip

        def rewrite(x_BHTD: Tensor, layer: int, kind: Kind) -> Tensor:
            out = x_BHTD.clone()
            out[:, :, columns] = own[layer][kind == "value"]
            return out

        with capture.rewriting(rewrite):
            return student.conclude(prefix, x_BME)

    return think


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
    found = {}
    for name, tamper in TAMPERINGS.items():
        result = latent_exact_match(
            student,
            tokenizer,
            samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            think=tampered(student, tamper),
        )
        found[name] = result.share
    return found


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


def diagnose_latents(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    found: HeldOut,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> HeldOut:
    """An evaluation with what tampering does to it, and what can be read off the latents.

    ``exact_match_zeroed``, ``…_shuffled``, ``…_swapped``   see ``tampering``
    ``probe_<step>``       share of right results of a step, read off the latent that knows it best
    ``commonest_<step>``   what guessing would score; both only where rationales have equations
    Rows get ``nearest_tokens``: per latent the tokens that it is nearest to, best first.

    Raises:
        StudentError: there are no latents.
    """
    asked = [sample for sample in samples if is_gradable(sample)]
    tampered = tamper_with(
        student, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    metrics = found.metrics | {f"exact_match_{name}": share for name, share in tampered.items()}
    latents = read_latents(student, tokenizer, asked, batch_size=batch_size)
    if sum(bool(intermediate_results(sample)) for sample in asked) >= MIN_SAMPLES:
        probes = probe(latents, asked)
        for step, commonest in enumerate(probes.commonest, start=1):
            best = max(row[step - 1] for row in probes.accuracy)
            metrics |= {f"probe_{step}": best, f"commonest_{step}": commonest}
    nearest = {
        sample.sample_id: [tokenizer.batch_decode(ids.unsqueeze(-1)) for ids in row]
        for sample, row in zip(asked, latents.nearest_NMK, strict=True)
    }
    rows = [row | {"nearest_tokens": nearest[row["sample_id"]]} for row in found.rows]
    return HeldOut(metrics, rows)


# MERGED-DOC distill.latent.reading
# What can be read off the latents: intermediate results by linear probes, nearest tokens.
#
# A probe says whether a result is *there* in a form that one linear map can read; it does not say
# that the answer uses it (that is what tampering is for). Its accuracy means something only against
# the share of the commonest value, which is given beside it.


# MERGED-DOC distill.latent.diagnose
# All checks of a latent student at once, as figures and rows of an evaluation.
