"""Evaluating a saved student on a file of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvdistill.config.training import StudentConfig
from kvdistill.corpus.readers import read_jsonl
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import is_gradable
from kvdistill.distill.evaluate.held_out import HeldOut, score_held_out, score_latent
from kvdistill.distill.student.build import build_student, load_student_tokenizer
from kvdistill.distill.student.latent.model import LatentStudent, is_latent
from kvdistill.distill.student.latent.probes import diagnose_latents
from kvdistill.errors import CorpusError, StudentError

MAX_NEW_TOKENS: Final = 256
"""Room for a rationale and an answer in words."""


def evaluate_folder(
    student: Path,
    corpus: Path,
    *,
    max_samples: int | None,
    max_length: int,
    batch_size: int,
    generate: bool = False,
    max_new_tokens: int | None = None,
    diagnose: bool = False,
) -> HeldOut:
    """Score a Hugging Face folder on a JSONL corpus; with ``generate`` also let it answer.

    A latent student can only answer; with ``diagnose`` its latents are looked into and tampered
    with. Room for new tokens, if not given, is 256 or what a latent student was trained with.

    Raises:
        StudentError: the folder is not there, or is not a causal LM with a fast tokenizer.
        CorpusError: no such corpus, an unusable one, or nothing in it to answer.
    """
    samples = read_jsonl(corpus, limit=max_samples)
    if generate and not any(is_gradable(sample) for sample in samples):
        raise CorpusError(
            f"{corpus}: --generate puts prompts and compares answers, but no sample has both "
            "(rows of prompt/rationale/answer, or GSM8K's form)"
        )
    if not (student / "config.json").is_file():
        raise StudentError(
            f"{student} is not a model folder (it has no config.json); give the `student` folder "
            "of a run, or one of its checkpoints"
        )
    tokenizer = load_student_tokenizer(str(student))
    if is_latent(student):
        if not generate:
            raise StudentError(
                f"{student} holds a latent student, which is judged by its answers; add --generate"
            )
        thinking = LatentStudent.from_pretrained(student)
        return _evaluate_latent(
            thinking,
            tokenizer,
            samples,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens or thinking.config.max_new_tokens,
            diagnose=diagnose,
        )
    if diagnose:
        raise StudentError(f"{student} is no latent student: --diagnose looks into latents")
    model = build_student(StudentConfig(model=str(student)), tokenizer, seed=0)
    return score_held_out(
        model,
        tokenizer,
        samples,
        max_length=max_length,
        batch_size=batch_size,
        answer=None if generate else 0,
        max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
    )


def _evaluate_latent(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    diagnose: bool,
) -> HeldOut:
    room = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    found = score_latent(student, tokenizer, samples, **room)
    return diagnose_latents(student, tokenizer, samples, found, **room) if diagnose else found


def write_rows(found: HeldOut, path: Path) -> None:
    """One JSON object per sample, as a run's ``eval_samples.jsonl``."""
    rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    path.write_text("".join(rows), encoding="utf-8")
