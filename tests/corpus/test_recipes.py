"""Rationales of GSM8K in every form, and arithmetic whose every step is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvdistill.cli import cli
from kvdistill.corpus.readers import read_files
from kvdistill.corpus.recipes import arithmetic_samples, with_rationale
from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError

GSM8K = Sample(
    "0",
    (
        ("prompt", "How many?"),
        ("rationale", "\nShe sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72."),
        ("answer", "\n#### 72"),
    ),
)


def rationale(sample: Sample) -> str | None:
    return dict(sample.segments).get("rationale")


@pytest.mark.parametrize(
    ("form", "drop_last", "expected"),
    [
        ("annotated", False, rationale(GSM8K)),
        ("words", False, "\nShe sold 48/2 = 24 clips.\nIn all 48+24 = 72."),
        ("words", True, "\nShe sold 48/2 = 24 clips."),
        ("equations", False, "\n48/2=24 48+24=72"),
        ("equations", True, "\n48/2=24"),
    ],
)
def test_forms_of_a_rationale(form: str, drop_last: bool, expected: str) -> None:
    made = with_rationale(GSM8K, form, drop_last=drop_last)
    assert rationale(made) == expected
    assert [name for name, _ in made.segments] == ["prompt", "rationale", "answer"]


def test_a_single_step_that_is_dropped_leaves_an_empty_rationale() -> None:
    once = with_rationale(with_rationale(GSM8K, "words", drop_last=True), "words", drop_last=True)
    assert rationale(once) == ""
    plain = Sample("1", (("prompt", "a"), ("answer", "\nb")))
    assert with_rationale(plain, "equations") is plain


@pytest.mark.parametrize(("steps", "modulus"), [(1, 7), (4, 10), (3, 13)])
def test_every_equation_follows_from_the_one_before(steps: int, modulus: int) -> None:
    for sample in arithmetic_samples(40, steps=steps, modulus=modulus):
        parts = dict(sample.segments)
        equations = parts["rationale"].strip().split(" ")
        assert len(equations) == steps
        carried, question = re.match(r"\d+", parts["prompt"]).group(), ""
        for equation in equations:
            left, result = equation.split("=")
            first, operation, second = re.match(r"(\d+)([-+*])(\d+)$", left).groups()
            assert first == carried
            by_hand = {"+": int(first) + int(second), "-": int(first) - int(second),
                       "*": int(first) * int(second)}[operation]  # fmt: skip
            assert int(result) == by_hand % modulus
            carried, question = result, question + operation + second
        assert parts["prompt"].endswith(question)
        assert parts["answer"] == f"\n{carried}"
        short = arithmetic_samples(40, steps=steps, modulus=modulus, drop_last=True)
        wanted = equations[:-1]
        found = next(s for s in short if s.sample_id == sample.sample_id)
        assert (rationale(found) or "").split() == wanted


def test_one_seed_is_one_list_without_repetition() -> None:
    whole = arithmetic_samples(300, steps=2)
    assert arithmetic_samples(100, steps=2, skip=200) == whole[200:]
    assert len({dict(s.segments)["prompt"] for s in whole}) == 300
    assert arithmetic_samples(300, steps=2, seed=1) != whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "at least 1"), ({"modulus": 1}, "at least 1"), ({"steps": 1}, "at most half")],
)
def test_impossible_arithmetic_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        arithmetic_samples(1000, **arguments)


def test_the_commands_write_what_the_corpus_reads(tmp_path: Path) -> None:
    chains, solved = tmp_path / "chains.jsonl", tmp_path / "gsm8k.jsonl"
    source = tmp_path / "source.jsonl"
    answer = "a <<1+1=2>>2\nb <<2+1=3>>3\n#### 3"
    source.write_text(json.dumps({"question": "Q", "answer": answer}) + "\n", encoding="utf-8")
    for command in (
        ["arithmetic", str(chains), "--samples", "5", "--steps", "2", "--drop-last-step"],
        ["gsm8k", str(solved), "--from", str(source), "--rationale", "equations"],
        ["tokenizer", str(chains), str(tmp_path / "characters"), "--characters"],
    ):
        done = CliRunner().invoke(cli, ["data", *command])
        assert done.exit_code == 0, done.output
    assert read_files(chains) == arithmetic_samples(5, steps=2, drop_last=True)
    assert rationale(read_files(solved)[0]) == "\n1+1=2 2+1=3"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "characters")
    text = read_files(chains)[0].text
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
    assert tokenizer.decode(encoded["input_ids"]) == text
