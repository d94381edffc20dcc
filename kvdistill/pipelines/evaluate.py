"""Evaluating a saved student on a file of texts."""

from __future__ import annotations

from pathlib import Path

from kvdistill.config_training import StudentConfig
from kvdistill.corpus import read_jsonl
from kvdistill.distill.evaluate import Metrics, evaluate
from kvdistill.distill.student import build_student
from kvdistill.distill.tokenizer import load_tokenizer
from kvdistill.errors import StudentError


def evaluate_folder(
    student: Path, corpus: Path, max_samples: int | None, max_length: int, batch_size: int
) -> Metrics:
    """Score a Hugging Face folder on a JSONL corpus.

    Raises:
        StudentError: the folder is not there, or is not a causal LM with a fast tokenizer.
        CorpusError: no such corpus, or an unusable one.
    """
    samples = read_jsonl(corpus, limit=max_samples)
    if not (student / "config.json").is_file():
        raise StudentError(
            f"{student} is not a model folder (it has no config.json); give the `student` folder "
            "of a run, or one of its checkpoints"
        )
    tokenizer = load_tokenizer(str(student))
    model = build_student(StudentConfig(model=str(student)), tokenizer, seed=0)
    return evaluate(model, tokenizer, samples, max_length=max_length, batch_size=batch_size)
