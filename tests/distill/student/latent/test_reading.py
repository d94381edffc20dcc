"""Probes find what was planted and nothing in noise; results are read out of rationales."""

from __future__ import annotations

import pytest
import torch

from kvdistill.corpus.recipes import arithmetic_samples
from kvdistill.corpus.samples import Sample
from kvdistill.distill.student.latent.model import left_padded
from kvdistill.distill.student.latent.probes import (
    Latents,
    intermediate_results,
    probe,
    read_latents,
)
from kvdistill.errors import CorpusError
from tests.distill.student.latent.test_generation import TOKENIZER, student_of

SAMPLES = arithmetic_samples(400, steps=2, modulus=7)


def test_results_are_what_follows_an_equal_sign() -> None:
    rationale = "\n3*4 = 12, 1,200/2=$600.5"
    sample = Sample("a", (("prompt", "1=9"), ("rationale", rationale)))
    assert intermediate_results(sample) == ["12", "600.5"]
    assert intermediate_results(Sample("b", (("text", "2=2"),))) == []


def test_a_planted_result_is_found_where_it_was_planted() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 3, 16, generator=generator)
    results = [[int(value) for value in intermediate_results(s)] for s in SAMPLES]
    directions = torch.randn(7, 16, generator=generator) * 4
    hidden[:, 1] += directions[[first for first, _ in results]]
    hidden[:, 2] += directions[[second for _, second in results]]
    found = probe(Latents(hidden, torch.zeros(400, 3, 1)), SAMPLES)
    planted = [found.accuracy[1][0], found.accuracy[2][1]]
    elsewhere = [found.accuracy[0][0], found.accuracy[0][1], found.accuracy[1][1]]
    assert min(planted) > 0.97
    assert max(elsewhere) < 0.3  # of 7 values
    assert all(0.05 < share < 0.3 for share in found.commonest)


def test_too_few_equations_are_refused() -> None:
    latents = Latents(torch.randn(5, 2, 4), torch.zeros(5, 2, 1))
    with pytest.raises(CorpusError, match="at least 20 samples"):
        probe(latents, SAMPLES[:5])


def test_latents_are_read_in_the_samples_order_whatever_the_batch() -> None:
    student = student_of(method="pccot", iterations=2)
    samples = SAMPLES[:5]
    read = read_latents(student, TOKENIZER, samples, batch_size=2)
    assert read.hidden_NME.shape == (5, 3, 32)
    for i, sample in enumerate(samples):
        ids, mask = left_padded(TOKENIZER, [dict(sample.segments)["prompt"]])
        with torch.inference_mode():
            thought = student(ids, mask)
            logits = student.backbone.lm_head(thought.latents[0])
        torch.testing.assert_close(read.hidden_NME[i], thought.latents[0], atol=1e-5, rtol=1e-5)
        assert read.nearest_NMK[i, :, 0].tolist() == logits.argmax(-1).tolist()
