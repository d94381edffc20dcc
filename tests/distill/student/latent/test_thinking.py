"""Thinking against the slow way, the forms against each other, padding against none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvdistill.distill.student.latent.model import LatentStudent
from tests.attention.families import DECODERS
from tests.distill.student.latent.thinkers import LLAMA, batch, like, rows, slow, thinker

METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "pause": {"method": "pause"},
    "one refinement": {"method": "pccot", "iterations": 1},
    "three refinements": {"method": "pccot", "iterations": 3},
    "codi": {"method": "codi"},
}
FAMILIES = [
    "llama",
    "mistral, sliding",
    "qwen3",
    "gemma3, sliding",
    "gpt2, fused",
    "falcon, MQA",
    "deepseek_v3, latent",
    "minicpm3, latent",
    "gpt_oss, sinks",
]


def gradients(student: LatentStudent, *values: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    sum(value.square().sum() for value in values).backward()
    return {k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_the_slow_way_one_by_one(
    settings: dict[str, Any], family: str
) -> None:
    student = thinker(DECODERS[family], num_latents=5, **settings)
    given = batch()
    thought = student(**given)
    for i, one in enumerate(rows(given)):
        logits, latents = slow(student, one)
        torch.testing.assert_close(
            thought.answer_logits[i, : len(logits)], logits, atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(thought.latents[i], latents, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_gradients_equal_those_of_the_slow_way(settings: dict[str, Any]) -> None:
    student = thinker(num_latents=4, **settings)
    one = rows(batch())[0]
    fast = gradients(student, student(**one).answer_logits)
    logits, _ = slow(student, one)
    reference = gradients(student, logits)
    assert fast.keys() == reference.keys()
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-4, rtol=1e-3, msg=name)
    if student.projector is not None:
        assert float(fast["projector.layers.1.weight"].abs().max()) > 0


def test_as_many_refinements_as_latents_are_the_sequential_form() -> None:
    jacobi = thinker(num_latents=5, method="pccot", iterations=5)
    sequential = like(jacobi, method="codi")
    given = batch()
    ours, theirs = jacobi(**given), sequential(**given)
    torch.testing.assert_close(ours.answer_logits, theirs.answer_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-5, rtol=1e-5)
    other = gradients(sequential, theirs.answer_logits)
    for name, gradient in gradients(jacobi, ours.answer_logits).items():
        if name == "latents_ME":  # their first inputs are refined away
            assert float(gradient.abs().max()) < 1e-4
        else:
            torch.testing.assert_close(gradient, other[name], atol=1e-4, rtol=1e-3, msg=name)


def test_every_refinement_settles_one_more_latent() -> None:
    sequential = thinker(num_latents=5, method="codi")(**batch()).latents
    student = thinker(num_latents=5, method="pccot", iterations=5)
    for iterations in range(1, 6):
        found = like(student, iterations=iterations)(**batch()).latents
        settled = (found - sequential).abs().amax((0, 2)) < 1e-5
        assert settled.tolist()[:iterations] == [True] * iterations
        assert settled.tolist()[iterations:] == [False] * (5 - iterations)


def test_no_refinement_is_pause_tokens() -> None:
    pause = thinker(num_latents=5, method="pause")
    none = like(pause, method="pccot", iterations=0)
    given = batch()
    assert torch.equal(pause(**given).answer_logits, none(**given).answer_logits)
    assert none.projector is None
    assert pause.num_passes == none.num_passes == 1


def test_padding_changes_no_gradient() -> None:
    student = thinker(LLAMA, num_latents=4, method="pccot", iterations=2)
    given = batch()
    logits = student(**given).answer_logits
    kept = [logits[i, : 1 + n] for i, n in enumerate((3, 1, 2))]
    whole = gradients(student, *kept)
    alone = gradients(student, *(student(**one).answer_logits for one in rows(given)))
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-4, rtol=1e-3, msg=name)
