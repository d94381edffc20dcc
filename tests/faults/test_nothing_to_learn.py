"""A run that had nothing to learn from, or nothing to be scored on, does not finish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvdistill.corpus.readers import load_corpus
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Collate
from kvdistill.errors import CorpusError
from kvdistill.pipelines import train as stage_2
from kvdistill.pipelines.evaluate import evaluate_folder
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from tests.pipelines.tiny import variant


def never_finished(output: Path) -> bool:
    return not any(RunFolder(p).read_record().get("finished") for p in output.iterdir())


def test_texts_cut_to_nothing_are_refused_at_once(extracted: Path, tmp_path: Path) -> None:
    experiment = variant(extracted, tmp_path, training__max_length=1)
    with pytest.raises(CorpusError, match=r"none of the \d+ texts .*raise the maximum length"):
        train(experiment)
    assert never_finished(tmp_path)
    assert not [*tmp_path.rglob("student")]


def test_a_held_out_text_without_a_token_is_refused_before_training(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = [Sample("blank", (("text", ""),))]
    found = load_corpus(variant(extracted, tmp_path).corpus)
    monkeypatch.setattr(stage_2, "load_corpus", lambda _: replace(found, evaluation=blank))
    with pytest.raises(CorpusError, match="none of the 1 texts from 'blank'"):
        train(variant(extracted, tmp_path))
    assert never_finished(tmp_path)


def test_an_evaluation_of_no_token_is_refused(extracted: Path, tmp_path: Path) -> None:
    student = train(variant(extracted, tmp_path / "runs", training__max_steps=1)).folder / "student"
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    limits: dict[str, Any] = {"max_samples": None, "max_length": 1, "batch_size": 2}
    with pytest.raises(CorpusError, match=r"none of the 1 texts .*raise the maximum length"):
        evaluate_folder(student, tmp_path / "short.jsonl", **limits)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_whose_teachers_covered_no_token_does_not_finish(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    def uncovered(collate: Collate, space: Any, rows: Any, student: Any) -> Any:
        batch = covered(collate, space, rows, student)
        return {**batch, "covered": batch["covered"] & False}

    covered = Collate._teacher
    monkeypatch.setattr(Collate, "_teacher", uncovered)
    experiment = variant(extracted, tmp_path, training__max_steps=2, training__save_steps=1)
    for _ in range(1 + resumes):
        with pytest.raises(CorpusError, match=r"in 2 steps no token was covered by a teacher"):
            train(experiment)
    assert never_finished(tmp_path)
    assert not [*tmp_path.rglob("student")]


def test_prompts_alone_are_not_learned_from_where_prompts_do_not_count(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sample, "spans", property(lambda s: ((0, len(s.text), 1),)))
    changes = {"losses__cross_entropy_prompt": False, "training__max_steps": 2}
    changes |= {"training__max_length": 8}  # or each text would end in a token of its own
    with pytest.raises(CorpusError, match=r"no token was predicted"):
        train(variant(extracted, tmp_path, **changes))
