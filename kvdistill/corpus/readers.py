"""The corpus that a config names, split into what is trained on and what is held out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from kvdistill.config.corpus import CorpusConfig, CorpusSource
from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError, MissingExtra
from kvdistill.types import CorpusFormat, SegmentName


@dataclass(frozen=True)
class Splits:
    """Samples to extract and train on, and samples that only evaluation sees."""

    train: list[Sample]
    evaluation: list[Sample]


def load_corpus(config: CorpusConfig) -> Splits:
    """Read the corpus, part by part, and hold out what the config says.

    Raises:
        CorpusError: missing, empty or malformed, or nothing is left to train on.
    """
    splits = Splits([], [])
    for name, source in config.sources.items():
        samples = [_of_part(name, sample) for sample in _read_source(source)]
        if config.eval_samples >= len(samples):
            where = f"its part {name!r}" if name else "the corpus"
            raise CorpusError(
                f"corpus.eval_samples is {config.eval_samples}, but {where} has only "
                f"{len(samples)} samples; nothing is left to train on"
            )
        edge = len(samples) - config.eval_samples
        splits.train.extend(samples[:edge])
        splits.evaluation.extend(samples[edge:])
    if config.eval_path is not None:
        splits.evaluation.extend(read_jsonl(config.eval_path, config.format))
    return splits


def _read_source(source: CorpusSource) -> list[Sample]:
    limit = source.max_samples
    if source.path is not None:
        return read_jsonl(source.path, source.format, limit)
    assert source.dataset is not None  # the config has exactly one of the two
    return read_dataset(source.dataset, source.subset, source.split, source.format, limit)


def _of_part(name: str, sample: Sample) -> Sample:
    """Ids are unique over all parts; a part's name is the task of samples that have none."""
    if not name:
        return sample
    return replace(sample, sample_id=f"{name}/{sample.sample_id}", task=sample.task or name)


GSM8K_ANSWER: Final = "\n#### "


def read_jsonl(path: Path, form: CorpusFormat = "auto", limit: int | None = None) -> list[Sample]:
    """Read a JSONL file of ``text``, ``prompt``/``rationale``/``answer`` or GSM8K rows.

    Raises:
        CorpusError: the file is missing, empty, not JSONL, or a row has no known form.
    """
    if not path.is_file():
        raise CorpusError(f"corpus file not found: {path}; check corpus.path in the config")
    samples: list[Sample] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if limit is not None and len(samples) >= limit:
                break
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{where}: not JSON ({error})") from None
            samples.append(_sample_from_row(row, len(samples), form, where))
    return _checked(samples, str(path))


def read_dataset(
    name: str, subset: str | None, split: str, form: CorpusFormat = "auto", limit: int | None = None
) -> list[Sample]:
    """Read a Hugging Face dataset by name (extra ``datasets``).

    Raises:
        MissingExtra: ``datasets`` is not installed.
        CorpusError: the dataset cannot be loaded, or a row has no known form.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            "corpus.dataset needs the extra 'datasets': pip install 'kvdistill[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises many kinds; the message is what helps
        raise CorpusError(f"cannot load dataset {name!r} ({subset}, {split}): {error}") from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    samples = [
        _sample_from_row(dict(row), i, form, f"{name}[{split}], row {i}")
        for i, row in enumerate(rows)
    ]
    return _checked(samples, f"{name}[{split}]")


def _checked(samples: list[Sample], where: str) -> list[Sample]:
    if not samples:
        raise CorpusError(f"{where}: the corpus is empty; it needs at least one sample")
    seen: set[str] = set()
    for sample in samples:
        if sample.sample_id in seen:
            raise CorpusError(f"{where}: sample_id {sample.sample_id!r} occurs twice")
        seen.add(sample.sample_id)
    return samples


def _sample_from_row(row: Any, position: int, form: CorpusFormat, where: str) -> Sample:
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: expected a JSON object, got {type(row).__name__}")
    sample_id = str(row.get("sample_id", row.get("id", f"{position:08d}")))
    task = row.get("task")
    return Sample(
        sample_id, _segments_from_row(row, form, where), None if task is None else str(task)
    )


def _segments_from_row(
    row: dict[str, Any], form: CorpusFormat, where: str
) -> tuple[tuple[SegmentName, str], ...]:
    if form in ("auto", "text") and isinstance(row.get("text"), str):
        return (("text", row["text"]),)
    if form in ("auto", "gsm8k") and {"question", "answer"} <= row.keys():
        return gsm8k_segments(str(row["question"]), str(row["answer"]), where)
    if form in ("auto", "segments") and "prompt" in row:
        return prompt_segments(row, where)
    raise CorpusError(
        f"{where}: expected 'text', or 'prompt' with 'rationale' and 'answer', or GSM8K's "
        f"'question' and 'answer'; got the keys {sorted(row)} (corpus.format: {form})"
    )


def prompt_segments(row: dict[str, Any], where: str) -> tuple[tuple[SegmentName, str], ...]:
    """Segments of a ``prompt``/``rationale``/``answer`` row, separated by one newline each."""
    names: tuple[SegmentName, ...] = ("prompt", "rationale", "answer")
    parts: list[tuple[SegmentName, str]] = []
    for name in names:
        text = row.get(name)
        if text is None:
            continue
        if not isinstance(text, str):
            raise CorpusError(f"{where}: {name} must be text, got {type(text).__name__}")
        separator = "\n" if parts and not text.startswith("\n") else ""
        parts.append((name, separator + text))
    return tuple(parts)


def gsm8k_segments(question: str, answer: str, where: str) -> tuple[tuple[SegmentName, str], ...]:
    """Question, worked solution and the final ``#### 72`` of a GSM8K row."""
    rationale, marker, final = answer.rpartition(GSM8K_ANSWER)
    if not marker:
        raise CorpusError(f"{where}: a GSM8K answer ends with a line '#### <number>'")
    return (
        ("prompt", question),
        ("rationale", "\n" + rationale),
        ("answer", marker + final),
    )
