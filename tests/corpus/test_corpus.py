"""Reading corpora and cutting them into shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.commands.prepare import _write_jsonl
from kvdistill.corpus.readers import read_files
from kvdistill.corpus.samples import Sample, corpus_fingerprint, cut_into_shards
from kvdistill.errors import CorpusError


def write(folder: Path, *rows: object) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gsm8k_rows_become_three_segments(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "Two.\nThree.\n#### 5"}
    (sample,) = read_files(write(tmp_path, row))
    assert sample.segments == (
        ("prompt", "How many?"),
        ("rationale", "\nTwo.\nThree."),
        ("answer", "\n#### 5"),
    )
    assert sample.text == "How many?\nTwo.\nThree.\n#### 5"
    assert sample.spans == [(0, 9, 1), (9, 21, 2), (21, 28, 3)]


def test_text_and_segment_rows_and_tasks(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"text": "plain", "task": "prose"},
        {"id": "b", "prompt": "p", "rationale": "r", "answer": "a"},
        {"prompt": "only a prompt"},
        {"text": ""},
    )
    plain, segmented, prompt, empty = read_files(path)
    assert (plain.text, plain.task, plain.sample_id) == ("plain", "prose", "00000000")
    assert (segmented.text, segmented.sample_id) == ("p\nr\na", "b")
    assert prompt.segments == (("prompt", "only a prompt"),)
    assert empty.text == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ('{"text": "a"}\nnot json\n', "line 2"),
        ('{"body": "a"}\n', "'text'"),
        ("[1]\n", "JSON object"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "occurs twice"),
        ('{"prompt": "a", "answer": 3}\n', "answer must be text"),
    ],
)
def test_bad_corpora_are_refused_by_name(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=words) as caught:
        read_files(path)
    assert "corpus.jsonl" in str(caught.value)


def test_a_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="not found"):
        read_files(tmp_path / "none.jsonl")


TEXTS = st.lists(st.text(max_size=30), min_size=1, max_size=30)


@given(texts=TEXTS, budget=st.integers(1, 100))
def test_shards_partition_the_corpus_in_order(texts: list[str], budget: int) -> None:
    samples = [Sample(str(i), (("text", text),)) for i, text in enumerate(texts)]
    shards = list(cut_into_shards(samples, budget))
    assert [sample for shard in shards for sample in shard.samples] == samples
    assert [shard.first_sample for shard in shards] == [
        sum(len(other.samples) for other in shards[:i]) for i in range(len(shards))
    ]
    for shard in shards:
        assert shard.num_chars <= budget or len(shard.samples) == 1


@given(texts=TEXTS)
def test_samples_round_trip_and_fingerprints_tell_corpora_apart(texts: list[str]) -> None:
    samples = [Sample(str(i), (("text", text),), "task") for i, text in enumerate(texts)]
    again = [Sample.from_json(sample.to_json()) for sample in samples]
    assert again == samples
    assert corpus_fingerprint(again) == corpus_fingerprint(samples)
    assert corpus_fingerprint(samples[:-1]) != corpus_fingerprint(samples)


def test_written_corpora_keep_every_label(tmp_path: Path) -> None:
    samples = [Sample("a", (("text", "x"),), "math", "smollm2"), Sample("b", (("text", "y"),))]
    _write_jsonl(samples, tmp_path / "out.jsonl")
    assert read_files(tmp_path / "out.jsonl") == samples
    assert [Sample.from_json(sample.to_json()) for sample in samples] == samples
