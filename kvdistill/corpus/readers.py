"""Reading the corpus of a config, and splitting it into training and held-out samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from kvdistill.config.corpus import CorpusConfig
from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError, MissingExtra
from kvdistill.types import CorpusFormat, SegmentName

GSM8K_ANSWER: Final = "\n#### "

Segments = tuple[tuple[SegmentName, str], ...]


@dataclass(frozen=True)
class Splits:
    """Samples for extraction and training, and held-out samples for evaluation."""

    train: list[Sample]
    evaluation: list[Sample]


def load_corpus(config: CorpusConfig) -> Splits:
    """Read every part of the corpus and hold out evaluation samples.

    With parts, sample ids are prefixed with the part's name, which is also the task of samples
    without one.

    Raises:
        CorpusError: missing, empty or malformed, or nothing is left to train on.
    """
    splits = Splits([], [])
    for name, source in config.sources.items():
        form, limit = source.format, source.max_samples
        if source.path is not None:
            samples = read_jsonl(source.path, form, limit)
        else:  # validated: exactly one of the two is given
            samples = read_dataset(str(source.dataset), source.subset, source.split, form, limit)
        if name:
            samples = [
                replace(s, sample_id=f"{name}/{s.sample_id}", task=s.task or name) for s in samples
            ]
        num_train = len(samples) - config.eval_samples
        if num_train <= 0:
            where = f"part {name!r}" if name else "the corpus"
            raise CorpusError(
                f"corpus.eval_samples is {config.eval_samples}, but {where} has only "
                f"{len(samples)} samples; nothing is left to train on"
            )
        splits.train.extend(samples[:num_train])
        splits.evaluation.extend(samples[num_train:])
    if config.eval_path is not None:
        splits.evaluation.extend(read_jsonl(config.eval_path, config.format))
    return splits


def read_jsonl(path: Path, form: CorpusFormat = "auto", limit: int | None = None) -> list[Sample]:
    """Read a JSONL file of ``text``, ``prompt``/``rationale``/``answer`` or GSM8K rows.

    Raises:
        CorpusError: the file is missing, empty or not JSONL, a row has no known format, or a
            sample id is duplicated. The message names file and line.
    """
    if not path.is_file():
        raise CorpusError(f"corpus file not found: {path}; check corpus.path in the config")
    with path.open(encoding="utf-8") as lines:
        return _samples(islice(_json_rows(lines, path), limit), form, str(path))


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{where}: not JSON ({error})") from None


def read_dataset(
    name: str, subset: str | None, split: str, form: CorpusFormat = "auto", limit: int | None = None
) -> list[Sample]:
    """Read a Hugging Face dataset by name (extra ``datasets``).

    Raises:
        MissingExtra: ``datasets`` is not installed.
        CorpusError: the dataset cannot be loaded, or as for ``read_jsonl``.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            "corpus.dataset needs the extra 'datasets': pip install 'kvdistill[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # no common base class of what the loaders raise
        raise CorpusError(f"cannot load dataset {name!r} ({subset}, {split}): {error}") from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    source = f"{name}[{split}]"
    return _samples(((f"{source}, row {i}", dict(row)) for i, row in enumerate(rows)), form, source)


def _samples(rows: Iterable[tuple[str, Any]], form: CorpusFormat, source: str) -> list[Sample]:
    """Samples of ``(location, row)`` pairs; a missing id is the row's position."""
    samples: dict[str, Sample] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: expected a JSON object, got {type(row).__name__}")
        sample_id = str(row.get("sample_id", row.get("id", f"{len(samples):08d}")))
        if sample_id in samples:
            raise CorpusError(f"{where}: sample_id {sample_id!r} occurs twice")
        task = row.get("task")
        segments = _segments(row, form, where)
        samples[sample_id] = Sample(sample_id, segments, None if task is None else str(task))
    if not samples:
        raise CorpusError(f"{source}: the corpus is empty; expected at least one sample")
    return list(samples.values())


def _segments(row: dict[str, Any], form: CorpusFormat, where: str) -> Segments:
    if form in ("auto", "text") and isinstance(row.get("text"), str):
        return (("text", row["text"]),)
    if form in ("auto", "gsm8k") and {"question", "answer"} <= row.keys():
        return gsm8k_segments(str(row["question"]), str(row["answer"]), where)
    if form in ("auto", "segments") and "prompt" in row:
        return _prompt_segments(row, where)
    raise CorpusError(
        f"{where}: expected 'text', or 'prompt' with 'rationale' and 'answer', or GSM8K's "
        f"'question' and 'answer'; got the keys {sorted(row)} (corpus.format: {form})"
    )


def _prompt_segments(row: dict[str, Any], where: str) -> Segments:
    """Segments of a ``prompt``/``rationale``/``answer`` row, separated by newlines."""
    names: tuple[SegmentName, ...] = ("prompt", "rationale", "answer")
    segments: list[tuple[SegmentName, str]] = []
    for name in names:
        text = row.get(name)
        if text is None:
            continue
        if not isinstance(text, str):
            raise CorpusError(f"{where}: {name} must be text, got {type(text).__name__}")
        separator = "\n" if segments and not text.startswith("\n") else ""
        segments.append((name, separator + text))
    return tuple(segments)


def gsm8k_segments(question: str, answer: str, where: str) -> Segments:
    """Question, worked solution and final ``#### 72`` of a GSM8K row."""
    rationale, marker, final = answer.rpartition(GSM8K_ANSWER)
    if not marker:
        raise CorpusError(f"{where}: expected a GSM8K answer that ends with '#### <number>'")
    return (("prompt", question), ("rationale", "\n" + rationale), ("answer", marker + final))
