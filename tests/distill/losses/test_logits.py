"""The divergence from stored predictions, against the definition over whole vocabularies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.attention.language_head import DeferredLogits
from kvdistill.distill.losses.logits import LogitLoss, divergence
from kvdistill.extract.predictions import LOWEST

N, VOCABULARY = 6, 11


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities and the student's logits, ``[N, V]``."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, N, VOCABULARY, generator=generator, dtype=torch.float64) * 3
    return teacher.log_softmax(-1), student


def top(logprob_NV: Tensor, k: int) -> dict[str, Tensor]:
    """What is stored of a teacher's distribution."""
    found = logprob_NV.topk(k)
    rest = logprob_NV.scatter(1, found.indices, -torch.inf).logsumexp(-1)
    rest = rest.clamp_min(LOWEST)
    return {"ids": found.indices, "logprob": found.values.float(), "rest": rest.float()}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_of_all_tokens_it_is_the_divergence_of_the_vocabulary(temperature: float) -> None:
    teacher, student = drawn()
    p, q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    wanted = temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    got = divergence(student, top(teacher, VOCABULARY), temperature)
    torch.testing.assert_close(got, wanted.float())


@pytest.mark.parametrize("k", range(1, VOCABULARY))
def test_of_some_tokens_it_is_that_of_summed_probabilities(k: int) -> None:
    teacher, student = drawn(k)
    student.requires_grad_()
    stored = top(teacher, k)
    merged = []
    for logprob in (teacher, student.log_softmax(-1)):
        chosen = logprob.gather(1, stored["ids"]).exp()
        merged.append(torch.cat([chosen, 1 - chosen.sum(1, keepdim=True)], dim=1))
    wanted = (merged[0] * (merged[0] / merged[1]).log()).sum(-1)
    got = divergence(student, stored)
    torch.testing.assert_close(got, wanted.float(), atol=1e-5, rtol=1e-4)
    whole = F.kl_div(student.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
    assert bool((got <= whole + 1e-5).all())
    (want_grad,) = torch.autograd.grad(wanted.sum(), student, retain_graph=True)
    (grad,) = torch.autograd.grad(got.sum(), student)
    torch.testing.assert_close(grad, want_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_tokens_that_the_student_lacks_count_among_the_others(temperature: float) -> None:
    teacher, student = drawn()
    stored = top(teacher, 4)
    lacking = stored | {"ids": torch.where(torch.arange(4) == 1, -1, stored["ids"])}
    lacking["rest"] = torch.logaddexp(stored["rest"], stored["logprob"][:, 1])
    kept = [0, 2, 3]
    without = {name: stored[name][:, kept] for name in ("ids", "logprob")}
    without["rest"] = lacking["rest"]
    got, wanted = (divergence(student, x, temperature) for x in (lacking, without))
    torch.testing.assert_close(got, wanted)


def test_teachers_are_weighted_where_they_predict() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, VOCABULARY, generator=generator, requires_grad=True)
    teachers, each = {}, {}
    masks = {"a": [False, True, True, False], "b": [True, False, True, False]}
    for seed, (name, mask) in enumerate(masks.items()):
        stored = top(drawn(seed)[0][:4], 3)
        stored = {key: x[None] for key, x in stored.items()}
        teachers[name] = {"predictions": stored | {"mask": torch.tensor([mask])}}
        shifted = {key: x[0, 1:] for key, x in stored.items()}
        each[name] = divergence(logits[0, :-1], shifted)
    serves = torch.ones(3, 1, 2, 4, dtype=torch.bool)
    alpha = torch.tensor([0.6, 0.2, 0.2]).view(3, 1, 1, 1).expand(3, 1, 2, 4)
    loss = LogitLoss(["a", "b", "encoder"], 1.0)
    batch = {"teachers": teachers | {"encoder": {}}, "labels": torch.zeros(1, 4).long()}
    # The first token has no prediction; b's of it counts nowhere. Both predicted the third.
    wanted = each["a"][0] + 0.75 * each["a"][1] + 0.25 * each["b"][1]
    got = loss(logits, batch, alpha, serves)
    torch.testing.assert_close(got, wanted)
    assert loss.count(batch, serves) == {"num_predictions": torch.tensor(2)}
    prompt = torch.tensor([[0, -100, 0, 0]])
    assert int(loss.count(batch | {"labels": prompt}, serves)["num_predictions"]) == 1
    unserved = serves.clone()
    unserved[0, :, :, 1] = False
    assert int(loss.count(batch, unserved)["num_predictions"]) == 1

    class Head:
        num_rows = 3

        def __call__(self, hidden: Tensor) -> Tensor:
            return hidden

    deferred = loss(DeferredLogits(logits, Head()), batch, alpha, serves)  # type: ignore[arg-type]
    torch.testing.assert_close(deferred, got)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (deferred, got)]
    torch.testing.assert_close(*grads)


def test_what_counts_nowhere_may_be_anything() -> None:
    logits = torch.randn(1, 3, VOCABULARY, requires_grad=True)
    stored = {
        "ids": torch.full((1, 3, 2), -1),
        "logprob": torch.zeros(1, 3, 2),
        "rest": torch.full((1, 3), -torch.inf),
        "mask": torch.zeros(1, 3, dtype=torch.bool),
    }
    serves = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    batch = {"teachers": {"a": {"predictions": stored}}, "labels": torch.zeros(1, 3).long()}
    total = LogitLoss(["a"], 1.0)(logits, batch, serves.float(), serves)
    total.backward()
    assert total == 0
    assert logits.grad is not None
    assert not logits.grad.any()
