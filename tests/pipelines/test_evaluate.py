"""Evaluation of runs and of saved students: figures per sample, answers, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvdistill.cli import cli
from kvdistill.errors import ConfigError, CorpusError
from kvdistill.pipelines.evaluate import evaluate_folder
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from tests.pipelines.tiny import variant
from tests.slurm.experiment import CORPUS


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_keeps_the_figures_of_every_held_out_sample(extracted: Path, tmp_path: Path) -> None:
    answers = {"training__exact_match_samples": 3, "training__max_new_tokens": 8}
    report = train(variant(extracted, tmp_path, training__eval_steps=3, **answers))
    rows = rows_of(RunFolder(report.folder).eval_samples)
    assert len(rows) == report.metrics["eval_num_samples"] == 4
    assert sum(row["nll"] for row in rows) == pytest.approx(report.metrics["eval_nll"])
    assert sum("correct" in row for row in rows) == report.metrics["eval_num_answers"] == 3
    assert 0 <= report.metrics["eval_calibration_error"] <= 1
    logged = rows_of(RunFolder(report.folder).log)
    assert [row["step"] for row in logged if "eval_exact_match" in row] == [3, 6]
    again = evaluate_folder(
        report.folder / "student", CORPUS, max_samples=48, max_length=64, batch_size=4
    )
    by_id = {row["sample_id"]: row["nll"] for row in again.rows}
    for row in rows:
        assert by_id[row["sample_id"]] == pytest.approx(row["nll"], rel=1e-5)


def test_the_command_generates_and_writes_rows(extracted: Path, tmp_path: Path) -> None:
    report = train(variant(extracted, tmp_path, training__max_steps=1))
    student, rows = str(report.folder / "student"), tmp_path / "rows.jsonl"
    options = ["--max-samples", "2", "--generate", "--max-new-tokens", "5", "--json"]
    done = CliRunner().invoke(
        cli, ["evaluate", student, str(CORPUS), *options, "--samples", str(rows)]
    )
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.output)
    assert metrics["num_answers"] == 2
    assert metrics["forward_passes"] <= 5
    assert [row["num_forwards"] <= 5 for row in rows_of(rows)] == [True, True]


def test_answers_need_prompts_and_answers(extracted: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "nothing to ask"}\n')
    asked = {"training__exact_match_samples": 2, "corpus__eval_samples": 0}
    with pytest.raises(ConfigError, match="exact_match_samples"):
        train(variant(extracted, tmp_path, corpus__eval_path=str(plain), **asked))
    with pytest.raises(CorpusError, match="--generate"):
        evaluate_folder(
            tmp_path, plain, max_samples=None, max_length=9, batch_size=1, generate=True
        )
