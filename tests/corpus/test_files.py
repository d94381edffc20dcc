"""Corpora as people have them: every form of file gives the same samples as JSONL."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvdistill.config.corpus import CorpusColumns
from kvdistill.corpus.readers import read_files
from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError, MissingExtra

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {"id": "a", "prompt": 'Say "hi", twice', "answer": "hi\nhi", "level": 3},
    {"id": "b", "prompt": "caf\u00e9 \U0001f600", "answer": "72", "level": 0.5},
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], **options: Any) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    columns = {name: [float(x) if name == "level" else x for x in map(dict(enumerate(rows)).get,
               range(len(rows))) for x in [x[name]]] for name in rows[0]}  # fmt: skip
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


FORMS = {
    "c.jsonl": jsonl(ROWS),
    "c": jsonl(ROWS).replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS),
    "c.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": jsonl(ROWS),
    "c.csv": as_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS, lineterminator="\n"),
    "semicolon.csv": as_csv(ROWS, delimiter=";"),
    "c.tsv": as_csv(ROWS, delimiter="\t"),
    "c.parquet": as_parquet(ROWS),
    "parquet-without-ending": as_parquet(ROWS),
    "c.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "misnamed.jsonl": gzip.compress(jsonl(ROWS)),
    "c.csv.zst": zstd(as_csv(ROWS)),
    "C.JSON.GZ": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    assert read_files(tmp_path / name) == [
        Sample("a", (("prompt", ROWS[0]["prompt"]), ("answer", "\nhi\nhi"))),
        Sample("b", (("prompt", ROWS[1]["prompt"]), ("answer", "\n72"))),
    ]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\r\ntwo\n\n\n", ["one", "two"]),
        (b"\xef\xbb\xbfa\nb\n\n  \nc\n", ["a\nb", "c"]),
        (b"  indented\n", ["  indented"]),
    ],
)
def test_plain_text_is_paragraphs_or_lines(
    tmp_path: Path, content: bytes, texts: list[str]
) -> None:
    (tmp_path / "book.txt").write_bytes(content)
    assert [sample.segments for sample in read_files(tmp_path / "book.txt")] == [
        (("text", text),) for text in texts
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,url\nhello\n", ["line 2", "1 of 2 cells"]),
        ("a.csv", b"text\nhello, you\n", ["line 2", "more than the 1", "quote"]),
        ("a.csv", b'text\n"a"b\n', ["line 2", "not CSV"]),
        ("a.csv", b"text,text\na,b\n", ["'text'", "twice"]),
        ("a.csv", b"text\ncaf\xe9\n", ["line 2", "0xe9"]),
        ("a.csv", b"text,url\na,http://x\n", ["line 2", "'url'", "ignore"]),
        ("a.csv", b"", ["empty"]),
        ("a.txt", b"fine\n\ncaf\xe9\n", ["line 3", "0xe9"]),
        ("a.json", b'[{"text": "a"},', ["not JSON", "array of objects"]),
        ("a.json", b'["a"]', ["row 0", "str"]),
        ("a.parquet", as_parquet(ROWS)[:-9], ["parquet", "write it anew"]),
        ("a.jsonl.zst", zstd(jsonl(ROWS))[:-9], ["a.jsonl.zst"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_malformed_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        read_files(tmp_path / name)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(tmp_path))
    for word in [name, *words]:
        assert word in message


def test_cells_of_other_columns_are_numbers_and_of_texts_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,question,reply,score,note\n007,2+2?,4,0.5,\n")
    columns = CorpusColumns(answer=("reply",))
    (sample,) = read_files(tmp_path / "a.csv", columns=columns)
    assert sample == Sample("007", (("prompt", "2+2?"), ("answer", "\n4")))


def test_a_glob_reads_its_files_in_order_under_names_of_their_own(tmp_path: Path) -> None:
    for name, content in {
        "data/b/0.jsonl": jsonl([{"id": 1, "text": "third"}]),
        "data/a/0.jsonl.gz": gzip.compress(jsonl([{"id": 1, "text": "first"}, {"text": "second"}])),
        "data/a/.hidden.jsonl": b"not JSON",
        "data/readme.md": b"not JSON",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    samples = read_files(tmp_path / "data/**/*.jsonl*")
    assert [(s.sample_id, s.text) for s in samples] == [
        ("a/0/1", "first"), ("a/0/00000001", "second"), ("b/0/1", "third"),
    ]  # fmt: skip
    assert read_files(tmp_path / "data/*/0.*", limit=2) == samples[:2]
    (tmp_path / "[1].jsonl").write_bytes(jsonl([{"text": "a"}]))
    assert len(read_files(tmp_path / "[1].jsonl")) == 1  # a file whose name looks like a glob
    with pytest.raises(CorpusError, match="no file matches"):
        read_files(tmp_path / "*.csv")
    (tmp_path / "data/a/0.csv").write_bytes(b"text\na\n")
    with pytest.raises(CorpusError, match="ending alone"):
        read_files(tmp_path / "data/a/0.*")


def test_ids_that_occur_twice_can_be_numbered_instead(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}]))
    with pytest.raises(CorpusError, match=r"id '1' occurs twice.*ignore: \[id\]"):
        read_files(tmp_path / "a.jsonl")
    samples = read_files(tmp_path / "a.jsonl", columns=CorpusColumns(ignore=("id",)))
    assert [s.sample_id for s in samples] == ["00000000", "00000001"]


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet(ROWS))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"kvdistill\[parquet\]"):
        read_files(tmp_path / "a.parquet")


CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\0"), max_size=12)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), form=st.sampled_from(
    ["csv", "tsv", "json", "parquet", "jsonl.gz", "csv.zst"]))  # fmt: skip
def test_any_text_survives_any_form(
    tmp_path: Path, pairs: list[tuple[str, str]], form: str
) -> None:
    rows = [{"prompt": a, "answer": b} for a, b in pairs]
    content = {
        "csv": as_csv(rows),
        "tsv": as_csv(rows, delimiter="\t"),
        "json": json.dumps(rows).encode(),
        "parquet": as_parquet(rows),
        "jsonl.gz": gzip.compress(jsonl(rows)),
        "csv.zst": zstd(as_csv(rows)),
    }[form]
    (tmp_path / f"a.{form}").write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    assert read_files(tmp_path / f"a.{form}") == read_files(tmp_path / "a.jsonl")
