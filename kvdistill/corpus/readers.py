"""Reading the corpus of a config, and splitting it into training and held-out samples.

A row is read whole or refused: text that no segment takes is an error unless its column is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from kvdistill.config.corpus import CorpusColumns, CorpusConfig, CorpusSource
from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError, MissingExtra
from kvdistill.text import brief, parse_json, shorten
from kvdistill.types import CorpusFormat, SegmentName

log = logging.getLogger(__name__)

GSM8K_ANSWER: Final = "\n#### "

ONE_OBJECT: Final = 'expected one JSON object per line, such as {"text": "…"}'

FOREIGN: Final = {
    b"\xff\xfe": "UTF-16; convert it with `iconv -f utf-16 -t utf-8`",
    b"\xfe\xff": "UTF-16; convert it with `iconv -f utf-16 -t utf-8`",
    b"{\0": "UTF-16; convert it with `iconv -f utf-16le -t utf-8`",
    b"\0{": "UTF-16; convert it with `iconv -f utf-16be -t utf-8`",
    b"\x1f\x8b": "compressed; decompress it with `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed; decompress it with `unzstd`",
    b"\xfd7zXZ": "compressed; decompress it with `unxz`",
    b"BZh": "compressed; decompress it with `bunzip2`",
    b"PK\x03\x04": "compressed; unpack it with `unzip`",
    b"PAR1": "parquet; give its folder as corpus.dataset, or convert it",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file with `git lfs pull`",
}
"""First bytes of files that are no JSONL, what these are, and the remedy."""

LABELS: Final = ("sample_id", "id", "task", "teacher")
Segments = tuple[tuple[SegmentName, str], ...]
NO_COLUMNS: Final = CorpusColumns()


@dataclass(frozen=True)
class Splits:
    """Samples for extraction and training, and held-out samples for evaluation."""

    train: list[Sample]
    evaluation: list[Sample]


def load_corpus(config: CorpusConfig) -> Splits:
    """Read every part of the corpus and hold out evaluation samples.

    With parts, sample ids are prefixed with the part's name, which is also the task of samples
    without one. Held-out texts that are also trained on are counted in a warning.

    Raises:
        CorpusError: missing, empty or malformed, or nothing is left to train on.
    """
    splits = Splits([], [])
    for name, source in config.sources.items():
        if source.path is None:
            samples = read_dataset(source)
        else:
            samples = read_jsonl(source.path, source.format, source.max_samples, source.columns)
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
        held_out = read_jsonl(config.eval_path, config.format, columns=config.columns)
        splits.evaluation.extend(held_out)
    texts = [sample.text for sample in splits.evaluation]
    trained = set(texts).intersection(sample.text for sample in splits.train)
    if trained:
        log.warning(
            "%d of %d held-out texts are also trained on, so held-out figures are too good; remove "
            "them from one of the two",
            *(sum(text in trained for text in texts), len(texts)),
        )
    return splits


def read_jsonl(
    path: Path,
    form: CorpusFormat = "auto",
    limit: int | None = None,
    columns: CorpusColumns = NO_COLUMNS,
) -> list[Sample]:
    """Read a JSONL file of ``text``, ``prompt``/``rationale``/``answer`` or GSM8K rows.

    Raises:
        CorpusError: the file is missing, empty or not JSONL in UTF-8, a row has no known format or
            text that no segment takes, or a sample id is duplicated. The message names file and
            line.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(32)
            if found := next(
                (FOREIGN[magic] for magic in FOREIGN if start.startswith(magic)), None
            ):
                raise CorpusError(f"{path}: expected JSONL in UTF-8, got {found}")
            # A byte that is no UTF-8 becomes a surrogate, so that its line can be named.
            with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
                return _samples(islice(_json_rows(lines, path), limit), form, str(path), columns)
        is_there = path.exists()
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror or error}; check its permissions") from error
    if is_there:
        raise CorpusError(f"{path} is a folder, a pipe or a device; expected a JSONL file")
    raise CorpusError(f"corpus file not found: {path}; check the path")


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                _require_unicode(line)
                row = parse_json(line)
            except UnicodeError as error:
                raise CorpusError(f"{where}: {error}") from None
            except ValueError as error:
                raise CorpusError(f"{where}: {error}; {ONE_OBJECT}") from None
            yield where, row


def _require_unicode(text: str) -> None:
    """Raise UnicodeError for a byte that was no UTF-8, or half a surrogate pair in an escape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x} alone"
        raise UnicodeError(
            f"not UTF-8: {what} after {before!r}; replace it, or convert the file, such as with "
            "`iconv -f latin1 -t utf-8`"
        ) from None


def read_dataset(source: CorpusSource) -> list[Sample]:
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
    where = f"{source.dataset}[{source.split}]"
    try:
        rows = datasets.load_dataset(source.dataset, source.subset, split=source.split)
    except Exception as error:  # no common base class of what the loaders raise
        cause = shorten(str(error))
        raise CorpusError(f"cannot load dataset {where} ({source.subset}): {cause}") from error
    if source.max_samples is not None:
        rows = rows.select(range(min(source.max_samples, len(rows))))
    located = ((f"{where}, row {i}", dict(row)) for i, row in enumerate(rows))
    return _samples(located, source.format, where, source.columns)


def _samples(
    rows: Iterable[tuple[str, Any]], form: CorpusFormat, source: str, columns: CorpusColumns
) -> list[Sample]:
    """Samples of ``(location, row)`` pairs; a missing id is the row's position."""
    samples: dict[str, Sample] = {}
    splits_answers: set[bool] = set()
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"got {type(row).__name__}; {ONE_OBJECT}")
            used, segments = _segments(row, form, columns)
            name = _first(row, LABELS[:2])
            sample_id = f"{len(samples):08d}" if name is None else str(row[name])
            task, teacher = (None if row.get(x) is None else str(row[x]) for x in LABELS[2:])
            sample = Sample(sample_id, segments, task, teacher)
            if sample_id in samples:
                raise ValueError(f"sample_id {brief(sample_id)} occurs twice")
            if used == ["question", "answer"]:
                splits_answers.add(len(segments) > len(used))
            if len(splits_answers) > 1:
                raise ValueError(
                    "rows of question and answer, of which some are GSM8K's and some are not (no "
                    "'####'); complete them, or set corpus.format: segments to split none"
                )
            _require_unicode(sample.to_json())
        except (ValueError, RecursionError) as error:
            cause = "nested too deeply" if isinstance(error, RecursionError) else error
            raise CorpusError(f"{where}: {cause}") from None
        samples[sample_id] = sample
    if not samples:
        raise CorpusError(f"{source}: the corpus is empty; expected at least one sample")
    return list(samples.values())


def _first(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of several columns that is there and not null."""
    return next((name for name in names if row.get(name) is not None), None)


def _has_text(value: Any) -> bool:
    """Whether a value is or holds text that is not blank."""
    if isinstance(value, str):
        return bool(value.strip())
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list, tuple)) and any(map(_has_text, inner))


def _segments(
    row: dict[str, Any], form: CorpusFormat, columns: CorpusColumns
) -> tuple[list[str], Segments]:
    """The columns that are read, and the segments in them; raises ValueError for any other text."""
    readable = {name: value for name, value in row.items() if name not in columns.ignore}
    names: tuple[SegmentName, ...] = ("prompt", "rationale", "answer")
    names = ("prompt", "answer") if form == "gsm8k" else names
    if form in ("auto", "text") and isinstance(row.get(_first(readable, columns.text) or ""), str):
        names = ("text",)
    found = {name: column for name in names if (column := _first(readable, getattr(columns, name)))}
    if names[0] not in found or (form == "text" and names[0] == "prompt"):
        raise ValueError(
            "expected 'text', or 'prompt' with 'rationale' and 'answer', or GSM8K's 'question' and "
            f"'answer', got the keys {shorten(', '.join(map(repr, row)), 120)} (corpus.format: "
            f"{form}); corpus.columns names others"
        )
    texts = {name: row[column] for name, column in found.items()}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{found[name]} must be text, got {type(text).__name__}")
    used = list(found.values())
    read = {*used, *(name for name in LABELS if not isinstance(row.get(name), (dict, list)))}
    if others := [name for name in readable if name not in read and _has_text(row[name])]:
        raise ValueError(
            f"the text in {shorten(', '.join(map(repr, others)), 150)} is not read (only "
            f"{', '.join(used)}); list it in corpus.columns.ignore (--ignore), or the columns to "
            "read in corpus.columns"
        )
    marked = used == ["question", "answer"] and GSM8K_ANSWER in texts["answer"]
    if form == "gsm8k" or (form == "auto" and marked):
        return used, gsm8k_segments(texts["prompt"], texts.get("answer", ""))
    return used, _joined(found, texts)


def _joined(columns: Mapping[SegmentName, str], texts: Mapping[SegmentName, str]) -> Segments:
    """Segments separated by newlines; a completion may begin, or its prompt end, with a space."""
    segments: list[tuple[SegmentName, str]] = []
    for name, text in texts.items():
        before = segments[-1][1] if segments else "\n"
        is_apart = text.startswith("\n") or not segments
        if columns[name] == "completion":
            is_apart |= not (text[:1].strip() and before[-1:].strip())
        segments.append((name, text if is_apart else "\n" + text))
    return tuple(segments)


def gsm8k_segments(question: str, answer: str, where: str = "answer") -> Segments:
    """Question, worked solution and final ``#### 72`` of a GSM8K row."""
    rationale, marker, final = answer.rpartition(GSM8K_ANSWER)
    if not marker:
        raise CorpusError(
            f"{where}: a question whose answer does not end with '#### <number>' is not GSM8K's; "
            "corpus.format: segments reads any question and answer"
        )
    return (("prompt", question), ("rationale", "\n" + rationale), ("answer", marker + final))
