"""Samples and their segments; the shard plan.

A sample is text in named segments. Separators belong to the segments, so a sample's whole text
is their plain concatenation and a character offset means the same to every tokenizer.
A corpus is cut once into shards of consecutive samples; shard ``i`` holds the same samples for
every teacher, which is what makes the shards of different teachers align.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal

from kvdistill.errors import CorpusError, MissingExtra
from kvdistill.types import SEGMENT_IDS, SegmentName

CorpusFormat = Literal["auto", "text", "segments", "gsm8k"]
GSM8K_ANSWER: Final = "\n#### "


@dataclass(frozen=True)
class Sample:
    """One sequence. ``segments`` are (name, text) in reading order; ``task`` is an optional tag."""

    sample_id: str
    segments: tuple[tuple[SegmentName, str], ...]
    task: str | None = None

    @property
    def text(self) -> str:
        """The whole text: all segments, concatenated."""
        return "".join(text for _, text in self.segments)

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """``(start, end, segment id)`` of every segment, as character offsets into ``text``."""
        ends = list(accumulate(len(text) for _, text in self.segments))
        starts = [0, *ends[:-1]]
        ids = (SEGMENT_IDS[name] for name, _ in self.segments)
        return list(zip(starts, ends, ids, strict=True))

    def to_json(self) -> str:
        """One JSON line; ``from_json`` reads it back."""
        body: dict[str, Any] = {"sample_id": self.sample_id, "segments": self.segments}
        if self.task is not None:
            body["task"] = self.task
        return json.dumps(body, ensure_ascii=False)

    @staticmethod
    def from_json(line: str) -> Sample:
        """Read a line written by ``to_json``."""
        body = json.loads(line)
        segments = tuple((name, text) for name, text in body["segments"])
        return Sample(body["sample_id"], segments, body.get("task"))


@dataclass(frozen=True)
class Shard:
    """Consecutive samples of a corpus: the unit of work, of commit and of reading."""

    shard_id: str
    first_sample: int
    samples: tuple[Sample, ...]

    def to_jsonl(self) -> str:
        """The content of ``corpus/<shard_id>.jsonl``."""
        return "".join(sample.to_json() + "\n" for sample in self.samples)

    @property
    def num_chars(self) -> int:
        """Characters of all samples."""
        return sum(len(sample.text) for sample in self.samples)


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
            samples.append(_sample(row, len(samples), form, where))
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
        _sample(dict(row), i, form, f"{name}[{split}], row {i}") for i, row in enumerate(rows)
    ]
    return _checked(samples, f"{name}[{split}]")


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over every sample's id, segments and task, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.to_json().encode() + b"\n")
    return digest.hexdigest()


def cut(samples: Sequence[Sample], shard_chars: int) -> Iterator[Shard]:
    """Cut a corpus into shards of consecutive samples of at most ``shard_chars`` characters.

    A sample longer than the budget is a shard of its own. Characters, not tokens: the plan must
    not depend on any one teacher's tokenizer.
    """
    first, size, pending = 0, 0, list[Sample]()
    number = 0
    for position, sample in enumerate(samples):
        length = len(sample.text)
        if pending and size + length > shard_chars:
            yield Shard(f"{number:05d}", first, tuple(pending))
            number, first, size, pending = number + 1, position, 0, []
        pending.append(sample)
        size += length
    if pending:
        yield Shard(f"{number:05d}", first, tuple(pending))


def _checked(samples: list[Sample], where: str) -> list[Sample]:
    if not samples:
        raise CorpusError(f"{where}: the corpus is empty; it needs at least one sample")
    seen: set[str] = set()
    for sample in samples:
        if sample.sample_id in seen:
            raise CorpusError(f"{where}: sample_id {sample.sample_id!r} occurs twice")
        seen.add(sample.sample_id)
    return samples


def _sample(row: Any, position: int, form: CorpusFormat, where: str) -> Sample:
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: expected a JSON object, got {type(row).__name__}")
    sample_id = str(row.get("sample_id", row.get("id", f"{position:08d}")))
    task = row.get("task")
    return Sample(sample_id, _segments(row, form, where), None if task is None else str(task))


def _segments(
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
