"""Corpus files made to break the reader: one short line each, or samples with all their text."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.corpus import CorpusColumns, CorpusConfig
from kvdistill.corpus.readers import load_corpus, read_files
from kvdistill.corpus.samples import Sample, corpus_fingerprint
from kvdistill.errors import CorpusError
from kvdistill.types import CorpusFormat
from tests.faults.verdict import MAX_MESSAGE, require_lines

ROOT = Path(__file__).parents[2]
DEEP = b'{"text": "a", "x": ' + b"[" * 99_999 + b"]" * 99_999 + b"}\n"


def read(folder: Path, content: bytes, *arguments: Any) -> list[Sample]:
    path = folder / "corpus.jsonl"
    path.write_bytes(content)
    return read_files(path, *arguments)


def rows(*given: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in given).encode()


def refused(folder: Path, content: bytes, *arguments: Any) -> str:
    """The message with which a file is refused."""
    with pytest.raises(CorpusError) as caught:
        read(folder, content, *arguments)
    message = str(caught.value)
    assert "corpus.jsonl" in message
    assert "\n" not in message
    assert len(message) <= MAX_MESSAGE + len(str(folder))
    return message


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + b'{"text": "caf\xe9"}\n', ["line 2", "0xe9 after", "caf'", "UTF-8", "iconv"]),
        (GOOD + b'{"text": "\xe2\x82"}', ["line 2", "0xe2", "UTF-8"]),
        (GOOD + b'{"text": "broken \\ud83d"}\n', ["line 2", r"\ud83d", "replace"]),
        (b'{"id": "\\udc12", "text": "a"}\n', ["line 1", "UTF-8"]),
        (b'{"task": "\\udc12", "text": "a"}\n', ["line 1", "UTF-8"]),
        (GOOD + DEEP, ["line 2", "nested", "one JSON object per line"]),
        (b'{"text": "a", "x": ' + b"[" * 900 + b'"b"' + b"]" * 900 + b"}\n", ["line 1"]),
        (b'{"id": ' + b"[" * 900 + b"]" * 900 + b', "text": "a"}\n', ["line 1", "nested"]),
        ('{"text":"a b"}\n'.encode("utf-16"), ["UTF-16", "iconv"]),
        ('{"text":"a b"}\n'.encode("utf-16-le"), ["UTF-16", "iconv"]),
        ('{"text":"a b"}\n'.encode("utf-16-be"), ["UTF-16", "iconv"]),
        (b"\x1f\x8b\x08\x00abc", ["damaged", "get the file again"]),
        (gzip.compress(GOOD * 99, mtime=0)[:-9], ["damaged", "get the file again"]),
        (gzip.compress("{}".encode("utf-16"), mtime=0), ["UTF-16", "iconv"]),
        (b"\x28\xb5\x2f\xfdabc", ["damaged", "get the file again"]),
        (b"PAR1\x15\x04\x15", ["parquet", "write it anew"]),
        (b"BZh91AY", ["bunzip2"]),
        (rows({"messages": []}), ["line 1", "list of turns"]),
        (rows({"messages": "hi"}), ["line 1", "list of turns"]),
        (rows({"messages": ["hi"]}), ["line 1", "turn 0", "role"]),
        (rows({"messages": [{"role": "tool", "content": "4"}]}), ["turn 0", "'tool'", "assistant"]),
        (rows({"messages": [{"role": "user", "content": 4}]}), ["turn 0", "text"]),
        (rows({"messages": [{"role": "user", "content": "a", "note": "b"}]}), ["'note'", "ignore"]),
        (rows({"body": "a", "url": "b"}), ['{prompt: ["body"], answer: ["url"]}', "'body', 'url'"]),
        (rows({"chat": [{"role": "x"}], "url": "b"}), ['{messages: ["chat"], ignore: ["url"]}']),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
        (b"Just some text.\n", ["line 1", "not JSON", '{"text"']),
        (b'[{"text": "a"}]\n', ["line 1", "list", '{"text"']),
        (b'{\n "text": "a"\n}\n', ["line 1", "one JSON object per line"]),
        (b'{"text": ' + b"9" * 5000 + b"}\n", ["line 1", "JSON"]),
        (b'{"text": "a", "text": "b"}\n', ["line 1", "'text'", "twice"]),
        (b'{"text": NaN}\n', ["line 1", "'text'"]),
        (b'{"prompt": null}\n', ["line 1", "'prompt'"]),
        (rows({"x" * 900: "a"}), ["line 1"]),
        (rows({f"key {i}": "a" for i in range(900)}), ["line 1"]),
        (rows({"text": "a", **{f"key {i}": "a" for i in range(900)}}), ["line 1", "columns"]),
        (rows({"id": "x" * 900, "text": "a"}, {"id": "x" * 900, "text": "b"}), ["line 2", "twice"]),
        (rows({"id": {"a": "b"}, "text": "a"}), ["line 1", "'id'"]),
        (rows({"task": ["a"], "text": "a"}), ["line 1", "'task'"]),
        (b"", ["empty"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_files(tmp_path: Path, content: bytes, words: list[str]) -> None:
    message = refused(tmp_path, content)
    for word in words:
        assert word in message


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in {
        tmp_path: "folder",
        tmp_path / "pipe": "pipe",
        Path("/dev/zero"): "device",
        tmp_path / "none.jsonl": "not found",
        tmp_path / ("x" * 300): "name too long",
    }.items():
        with pytest.raises(CorpusError) as caught:
            read_files(path)
        assert words in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbf" + GOOD) == read(tmp_path, GOOD)


def test_an_id_that_is_null_is_the_position(tmp_path: Path) -> None:
    content = rows({"id": None, "text": "a"}, {"id": None, "text": "b"}, {"id": "", "text": "c"})
    assert [sample.sample_id for sample in read(tmp_path, content)] == ["00000000", "00000001", ""]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "Two and two?", "completion": "Four."}, "Two and two?\nFour."),
        ({"prompt": "Two and two is", "completion": " four."}, "Two and two is four."),
        ({"prompt": "Two and two is ", "completion": "four."}, "Two and two is four."),
        ({"prompt": "Two?", "response": "Four."}, "Two?\nFour."),
        ({"instruction": "Add.", "input": "", "output": "4"}, "Add.\n4"),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "Add.\n2 2\n4"),
        ({"input": "2 2", "output": "4"}, "2 2\n4"),
        ({"context": "2 2", "question": "Sum?", "answer": "4"}, "Sum?\n2 2\n4"),
        ({"question": "Two?", "answer": "Four."}, "Two?\nFour."),
        ({"question": "Two?", "answer": "#### 4"}, "Two?\n#### 4"),
        ({"prompt": "p", "answer": None, "response": "r"}, "p\nr"),
        ({"prompt": "p", "rationale": "r", "answer": "a", "level": 3, "tags": []}, "p\nr\na"),
    ],
)
def test_pairs_are_read_whole(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    (sample,) = read(tmp_path, rows(row))
    assert sample.text == text
    assert sample.segments[0][0] == "prompt"
    assert sample.segments[-1][0] == "answer"


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"text": "one", "prompt": "what", "answer": "four"}, "'prompt', 'answer'"),
        ({"prompt": "what", "chosen": "four", "rejected": "five"}, "'chosen', 'rejected'"),
        ({"prompt": "p", "answer": "a", "response": "r"}, "'response'"),
        ({"text": "a", "messages": [{"role": "user", "content": "b"}]}, "'messages'"),
        ({"text": "a", "meta": {"url": ["http://x"]}}, "'meta'"),
    ],
)
def test_text_that_would_be_dropped(tmp_path: Path, row: dict[str, Any], unread: str) -> None:
    message = refused(tmp_path, rows(row))
    assert unread in message
    assert "corpus.columns.ignore" in message
    ignore = tuple(unread.replace("'", "").split(", "))
    (sample,) = read(tmp_path, rows(row), "auto", None, CorpusColumns(ignore=ignore))
    assert sample.text


def test_columns_by_other_names(tmp_path: Path) -> None:
    content = rows({"problem": "What is 2 + 2?", "solution": "4", "text": "n/a"})
    columns = CorpusColumns(prompt=("problem",), answer=("solution",), ignore=("text",))
    (sample,) = read(tmp_path, content, "auto", None, columns)
    assert sample.segments == (("prompt", "What is 2 + 2?"), ("answer", "\n4"))
    assert "'problem'" in refused(tmp_path, content.replace(b"text", b"body"))


def test_question_and_answer_that_are_not_gsm8ks(tmp_path: Path) -> None:
    plain, solved = {"question": "q", "answer": "a"}, {"question": "q", "answer": "s\n#### 1"}
    assert "not GSM8K's" in refused(tmp_path, rows(plain), "gsm8k")
    for content in (rows(plain, solved), rows(solved, plain)):
        assert "line 2" in (message := refused(tmp_path, content))
        assert "GSM8K" in message
        texts = [sample.text for sample in read(tmp_path, content, "segments")]
        assert sorted(texts) == ["q\na", "q\ns\n#### 1"]


def test_every_source_has_its_own_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows({"text": "a", "url": "x"}))
    (tmp_path / "b.jsonl").write_bytes(rows({"prompt": "b", "url": "x"}))
    parts = {
        name: {"path": tmp_path / f"{name}.jsonl", "columns": {"ignore": ["url"]}} for name in "ab"
    }
    body = {"parts": parts, "eval_path": tmp_path / "a.jsonl", "columns": {"ignore": ["url"]}}
    splits = load_corpus(CorpusConfig.model_validate(body))
    assert [sample.text for sample in splits.train + splits.evaluation] == ["a", "b", "a"]


def test_held_out_texts_that_are_trained_on_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.jsonl").write_bytes(rows(*({"text": text} for text in "abc")))
    (tmp_path / "test.jsonl").write_bytes(rows(*({"prompt": text} for text in "bcd")))
    body = {"path": tmp_path / "train.jsonl", "eval_path": tmp_path / "test.jsonl"}
    with caplog.at_level(logging.WARNING):
        load_corpus(CorpusConfig.model_validate(body))
    assert "2 of 3 held-out texts" in caplog.text
    caplog.clear()
    load_corpus(CorpusConfig(path=tmp_path / "train.jsonl", eval_samples=1))
    assert not caplog.records


FINGERPRINTS = {
    "gsm8k_test": "b9bc3a21825df53d73e55517e963126d0259820cd8de7233c4e5d5d16dfdbea4",
    "gsm8k_train": "985e30df2cbb3a3105c5829628028538b86aeeeeeba879fc156b617f6ea8a028",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_existing_corpora_are_read_as_ever(name: str) -> None:
    samples = read_files(ROOT / f"examples/data/{name}.jsonl")
    assert corpus_fingerprint(samples) == FINGERPRINTS[name]


def test_existing_rows_are_read_as_ever(tmp_path: Path) -> None:
    content = rows(
        {"text": "plain", "task": "prose"},
        {"id": "b", "prompt": "p", "rationale": "r", "answer": "a"},
        {"prompt": "only a prompt"},
        {"text": ""},
        {"sample_id": 7, "question": "q", "answer": "s\n#### 5", "task": 3},
        {"prompt": "p", "rationale": "\nr", "answer": None},
        {"id": 1.5, "prompt": "p", "answer": "\na", "score": 0.5, "tags": [1, 2]},
        {"text": "café \u2028 \x85 \u0000"},
    )
    assert corpus_fingerprint(read(tmp_path, content + b'\r\n{"text": "last"}\r\n')) == (
        "1c9ce7464edc0c9cfd1d28fb5b65ffb29464727a6a73487353d307e95409c945"
    )


WORDS = [
    "a",
    "two words",
    "caf\u00e9",
    "\u4f60\u597d",
    "\U0001f600",
    "s\n#### 5",
    "",
    " ",
    "\n",
    "\x00",
]
KEYS = [
    "text", "prompt", "rationale", "answer", "completion", "response", "question", "id",
    "sample_id", "task", "messages", "Text", "",
]  # fmt: skip
TOKENS = [
    b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\udfff", b"\\", b'"', b"{", b"}", b"[", b"]",
    b",", b":", b"\n", b"\r", b"\r\n", b"\x00", b"\xef\xbb\xbf", b"null", b"NaN", b"1e999", b"true",
    b"9" * 30, b'"text": "b"', b"{}", b"\n\n", b"\xe2\x80\xa8", b"[" * 2000,
]  # fmt: skip


def value(rng: random.Random) -> Any:
    nested = {rng.choice(KEYS): rng.choice(WORDS)}
    others = [None, 0, -1.5, True, [], nested, [rng.choice(WORDS)], 10**30]
    return rng.choice(WORDS) if rng.random() < 0.95 else rng.choice(others)


def mutated(rng: random.Random) -> bytes:
    """Rows of random columns, with up to three edits of their bytes, or in another encoding."""
    shape = rng.choice([["text"], ["prompt", "answer"], ["question", "answer"], ["completion"]])
    made = []
    for i in range(rng.randint(1, 4)):
        keys = [*shape, *rng.sample(KEYS, rng.choice([0] * 12 + [1, 2]))]
        keys += ["prompt"] if shape == ["completion"] else []
        made.append({"id": i} | {key: value(rng) for key in keys})
    content = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in made)
    encoding = rng.choice(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "latin-1"])
    data = content.encode(encoding, "replace")
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 30))
        token = rng.choice([*TOKENS, bytes([rng.randrange(256)])])
        data = rng.choice(
            [data[:at] + token + data[at:], data[:at] + data[end:], data[:at] + token + data[end:]]
        )
    return data


def texts_of(content: bytes) -> list[str]:
    """Every text in the rows of a file, but for ids and tasks."""
    found = []
    pending: list[Any] = []
    for line in content.decode("utf-8-sig").replace("\r", "\n").split("\n"):
        if line.strip():
            row = json.loads(line)
            pending += [row[key] for key in row if key not in ("id", "sample_id", "task")]
    while pending:
        item = pending.pop()
        found += [item] if isinstance(item, str) else []
        if isinstance(item, (dict, list)):
            pending += item.values() if isinstance(item, dict) else item
    return found


def fuzz(folder: Path, count: int) -> tuple[int, int]:
    """Read mutated files; how many were refused and how many had a valid meaning."""
    rng = random.Random(0)
    path = folder / "corpus.jsonl"
    messages: list[str] = []
    for _ in range(count):
        path.write_bytes(content := mutated(rng))
        form: CorpusFormat = rng.choice(["auto"] * 6 + ["text", "segments", "gsm8k"])
        try:
            samples = read_files(path, form)
        except CorpusError as error:
            messages.append(str(error))
            continue
        whole = "\0\0".join(sample.text for sample in samples)
        whole.encode()
        for text in texts_of(content):
            assert text.strip() in whole
    require_lines(messages, path)
    return len(messages), count - len(messages)


def test_mutated_files_are_refused_in_one_line_or_read_whole(tmp_path: Path) -> None:
    failed, valid = fuzz(tmp_path, 60)
    assert failed > 15
    assert valid > 10


@pytest.mark.slow
def test_a_thousand_mutated_files(tmp_path: Path) -> None:
    failed, valid = fuzz(tmp_path, 1000)
    assert failed > 300
    assert valid > 150
