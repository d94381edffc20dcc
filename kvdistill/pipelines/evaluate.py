"""Evaluation of a saved student on a JSONL corpus."""

from __future__ import annotations

from pathlib import Path

from kvdistill.config.corpus import CorpusColumns
from kvdistill.config.training import StudentConfig
from kvdistill.corpus.readers import read_files
from kvdistill.distill.evaluate.answers import is_gradable
from kvdistill.distill.evaluate.held_out import HeldOut, score_held_out, score_latent
from kvdistill.distill.student.build import build_student, load_student_tokenizer, require_positions
from kvdistill.distill.student.latent.model import LatentStudent, is_latent
from kvdistill.distill.student.latent.probes import diagnose_latents
from kvdistill.errors import CorpusError, StudentError
from kvdistill.store.commit import folder_fault
from kvdistill.store.format import COMMIT


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
    ignore: tuple[str, ...] = (),
) -> HeldOut:
    """Score a Hugging Face folder on a JSONL corpus; with ``generate`` also by exact match.

    A latent student is scored by exact match alone; ``diagnose`` adds probes and interventions on
    its latents. ``max_new_tokens`` is 256 if not given, or a latent student's own setting; columns
    to ``ignore`` are not read.

    Raises:
        StudentError: the folder is missing, or is not a causal LM with a fast tokenizer.
        CorpusError: the corpus is missing, malformed, or has no sample to answer.
    """
    samples = read_files(corpus, limit=max_samples, columns=CorpusColumns(ignore=ignore))
    if generate and not any(is_gradable(sample) for sample in samples):
        raise CorpusError(
            f"{corpus}: --generate needs samples with a prompt and an answer, but none has both; "
            "use rows of prompt/rationale/answer, or GSM8K's format"
        )
    require_student_folder(student)
    tokenizer = load_student_tokenizer(str(student))
    if is_latent(student):
        if not generate:
            raise StudentError(
                f"{student} is a latent student, which is scored by its answers; add --generate"
            )
        latent = LatentStudent.from_pretrained(student)
        new_tokens = max_new_tokens or latent.config.max_new_tokens
        limits = {"batch_size": batch_size, "max_new_tokens": new_tokens}
        found = score_latent(latent, tokenizer, samples, **limits)
        return diagnose_latents(latent, tokenizer, samples, found, **limits) if diagnose else found
    if diagnose:
        raise StudentError(f"{student} is not a latent student; leave out --diagnose")
    model = build_student(StudentConfig(model=str(student)), tokenizer, seed=0)
    require_positions(model, max_length, "--max-length")
    return score_held_out(
        model,
        tokenizer,
        samples,
        max_length=max_length,
        batch_size=batch_size,
        answer=None if generate else 0,
        max_new_tokens=max_new_tokens or 256,
    )


def require_student_folder(student: Path) -> None:
    """Raise StudentError where ``student`` is not a Hugging Face folder."""
    if not (student / "config.json").is_file():
        raise StudentError(
            f"{student} is not a model folder (it has no config.json); give the `student` folder "
            "of a run, or one of its checkpoints"
        )
    if (student / COMMIT).is_file() and (fault := folder_fault(student)):
        raise StudentError(
            f"{student}: {fault}; restore it from a copy, or remove {COMMIT} if you changed the "
            "student on purpose"
        )
