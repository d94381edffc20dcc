"""Latent thinking on SmolLM2 and Gemma 3: the same answers in a batch and alone, in both forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvdistill.config.distill import LatentConfig
from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.latent.model import LatentStudent, answer, left_padded
from tests.distill.student.latent.thinkers import like
from tests.slurm.experiment import CORPUS

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_think_alike_in_a_batch_and_alone(name: str, real_models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_models / name)
    backbone = AutoModelForCausalLM.from_pretrained(real_models / name, dtype=torch.float32)
    torch.manual_seed(0)
    config = LatentConfig(num_latents=4, iterations=4, projector_width=64)
    jacobi = LatentStudent(backbone, config).eval()
    sequential = like(jacobi, method="codi")
    questions = [dict(sample.segments)["prompt"] for sample in read_files(CORPUS, limit=2)]
    with torch.inference_mode():
        together = jacobi(*left_padded(tokenizer, questions)).answer_logits
        other = sequential(*left_padded(tokenizer, questions)).answer_logits
        alone = [jacobi(*left_padded(tokenizer, [q])).answer_logits for q in questions]
    scale = float(together.std())
    assert float((together - torch.cat(alone)).abs().max()) < 1e-3 * scale
    assert float((together - other).abs().max()) < 1e-3 * scale
    written = answer(jacobi, tokenizer, questions, 4)
    assert written == [answer(jacobi, tokenizer, [q], 4)[0] for q in questions]
