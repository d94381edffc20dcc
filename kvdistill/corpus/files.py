"""Rows of corpus files: JSONL, JSON arrays, CSV, parquet and plain text, compressed or not.

gzip, zstd and parquet are recognised by their first bytes, the others by the file's name; a name
without a known ending is JSONL. Every row comes with its place, for messages.
"""

from __future__ import annotations

import csv
import glob
import gzip
import importlib
import io
import itertools
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from kvdistill.errors import CorpusError, MissingExtra
from kvdistill.text import brief, parse_json, shorten

ONE_OBJECT: Final = 'expected one JSON object per line, such as {"text": "…"}'

FOREIGN: Final = {
    b"\xff\xfe": "UTF-16; convert it with `iconv -f utf-16 -t utf-8`",
    b"\xfe\xff": "UTF-16; convert it with `iconv -f utf-16 -t utf-8`",
    b"{\0": "UTF-16; convert it with `iconv -f utf-16le -t utf-8`",
    b"\0{": "UTF-16; convert it with `iconv -f utf-16be -t utf-8`",
    b"\xfd7zXZ": "compressed by xz; decompress it with `unxz`",
    b"BZh": "compressed by bzip2; decompress it with `bunzip2`",
    b"PK\x03\x04": "a zip archive; unpack it with `unzip`",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file with `git lfs pull`",
}
"""First bytes of files that are not read, what these are, and the remedy."""

GZIP: Final = b"\x1f\x8b"
ZSTD: Final = b"\x28\xb5\x2f\xfd"
PARQUET: Final = b"PAR1"
ENDINGS: Final = (".gz", ".zst", ".zstd", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
Row = tuple[str, Any]
"""Where a row is, and what it holds: a dict, unless the file is malformed."""


def corpus_files(path: Path) -> dict[str, Path]:
    """The file at ``path`` under the name ``""``, or those that match a glob by name, sorted.

    Names are paths below the files' common folder, without endings: ``train/00001``.

    Raises:
        CorpusError: no file matches, or two have the same name.
    """
    if not any(mark in str(path) for mark in "*?[") or path.exists():
        return {"": path}
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob matches hidden files)
    found = [file for file in map(Path, names) if file.is_file()]
    if not found:
        raise CorpusError(f"no file matches {path}; check the pattern")
    top, by_name = Path(os.path.commonpath([file.parent for file in found])), dict[str, Path]()
    for file in sorted(found):
        name = file.relative_to(top)
        while name.suffix.lower() in ENDINGS:
            name = name.with_suffix("")
        if (other := by_name.setdefault(name.as_posix(), file)) != file:
            raise CorpusError(
                f"{path} matches {other.name} and {file.name}, which differ in their ending alone; "
                "narrow the pattern, or rename one"
            )
    return by_name


def rows_of_file(path: Path, texts: Collection[str]) -> Iterator[Row]:
    """Rows of one file in order; ``texts`` are columns whose CSV cells stay text.

    Raises:
        CorpusError: not a file, unreadable, damaged, or in a form that is not read.
        MissingExtra: parquet or zstd without pyarrow.
    """
    try:
        if path.is_file():
            yield from _rows_in(path, texts)
            return
        is_there = path.exists()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CorpusError(
            f"{path}: damaged gzip data ({shorten(str(error), 100)}); get the file again"
        ) from None
    except OSError as error:
        if error.strerror is None:  # pyarrow's, of damaged data
            cause = shorten(str(error), 150)
            raise CorpusError(f"{path}: damaged: {cause}; get the file again") from None
        raise CorpusError(f"{path}: {error.strerror}; check its permissions") from error
    if is_there:
        raise CorpusError(f"{path} is a folder, a pipe or a device; expected a file, or a glob")
    raise CorpusError(f"corpus file not found: {path}; check the path")


def _rows_in(path: Path, texts: Collection[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        start = file.read(len(PARQUET))
    if start == PARQUET:
        yield from _parquet_rows(path)
        return
    names = [ending for suffix in path.suffixes if (ending := suffix.lower()) in ENDINGS]
    form = next((name for name in reversed(names) if name not in ENDINGS[:3]), ".jsonl")
    with _text(path, start, newline="" if form in (".csv", ".tsv") else None) as lines:
        match form:
            case ".csv" | ".tsv":
                yield from _csv_rows(path, lines, texts)
            case ".txt":
                yield from _paragraphs(path, lines)
            case ".json":
                yield from _json_array(path, lines)
            case _:
                yield from json_rows(path, lines)


@contextmanager
def _text(path: Path, start: bytes, newline: str | None) -> Iterator[TextIO]:
    """The file as text, decompressed.

    A byte that is not UTF-8 becomes a lone surrogate, so that its row can be named.
    """
    with path.open("rb") as file:
        buffered: Any = file
        if start.startswith(GZIP):
            buffered = io.BufferedReader(gzip.GzipFile(fileobj=file))
        elif start == ZSTD:
            stream = _pyarrow("pyarrow", path).CompressedInputStream(file, "zstd")
            buffered = io.BufferedReader(stream)
        head = buffered.peek(32)
        if found := next((FOREIGN[magic] for magic in FOREIGN if head.startswith(magic)), None):
            raise CorpusError(f"{path}: expected UTF-8, got {found}")
        with io.TextIOWrapper(buffered, "utf-8-sig", "surrogateescape", newline) as text:
            yield text


def json_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """One JSON value per line; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                require_unicode(line)
                row = parse_json(line)
            except UnicodeError as error:
                raise CorpusError(f"{where}: {error}") from None
            except ValueError as error:
                raise CorpusError(f"{where}: {error}; {ONE_OBJECT}") from None
            yield where, row


def _json_array(path: Path, lines: TextIO) -> Iterator[Row]:
    """The elements of an array; a file that does not begin with one is JSONL."""
    text = lines.read()
    if not text.lstrip().startswith("["):
        yield from json_rows(path, io.StringIO(text))
        return
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise CorpusError(f"{path}: {error}; expected one array of objects") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def _csv_rows(path: Path, lines: TextIO, texts: Collection[str]) -> Iterator[Row]:
    """Rows below a header; the delimiter is the comma, semicolon or tab that is in it most often.

    CSV has no types: a cell outside ``texts`` that reads as a number is one.
    """
    csv.field_size_limit(2**31 - 1)
    header = lines.readline()
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise CorpusError(f"{path}: the column {brief(twice[0])} is there twice; rename one")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                cells = sum(value is not None for value in row.values())
                found = f"more than the {len(names)}" if None in row else f"{cells} of {len(names)}"
                raise CorpusError(
                    f"{where}: {found} cells of the header; quote cells that hold {delimiter!r}"
                )
            yield where, {k: v if k in texts else _number(v) for k, v in row.items()}
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None


def _number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def _paragraphs(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """Paragraphs if blank lines separate any, otherwise lines."""
    numbered = [(number, line.rstrip("\n")) for number, line in enumerate(lines, start=1)]
    groups = itertools.groupby(numbered, key=lambda item: bool(item[1].strip()))
    blocks = [list(block) for is_text, block in groups if is_text]
    if len(blocks) == 1:
        blocks = [[line] for line in blocks[0]]
    for block in blocks:
        yield f"{path}, line {block[0][0]}", {"text": "\n".join(line for _, line in block)}


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet, number = _pyarrow("pyarrow.parquet", path), itertools.count()
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            yield from ((f"{path}, row {next(number)}", row) for row in batch.to_pylist())
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's inherit these
        cause = shorten(str(error), 150)
        raise CorpusError(
            f"{path}: cannot read this parquet file: {cause}; write it anew"
        ) from None


def _pyarrow(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{path} needs the extra 'parquet', which also reads zstd: pip install "
            "'kvdistill[parquet]'"
        ) from error


def require_unicode(text: str) -> None:
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
