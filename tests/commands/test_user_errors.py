"""What a user gets wrong is one line on stderr and exit code 1, and loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvdistill.cli import main
from kvdistill.config.load import load_experiment
from kvdistill.errors import StoreError
from kvdistill.pipelines.run_folder import begin
from tests.slurm.experiment import ROOT, write_experiment, write_models

GSM8K = ROOT / "examples/data/gsm8k_test.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture
def experiment(models: Path, tmp_path: Path) -> Path:
    return write_experiment(tmp_path, models)


def error_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any
) -> str:
    monkeypatch.setattr("sys.argv", ["kvdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1
    assert len(errors) == 1
    return errors[0]


def test_a_bad_config(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = error_of(
        capsys, monkeypatch, "extract", experiment, "--set", "extraction.bakend=zarr"
    )
    assert "did you mean 'backend'" in message


def test_a_missing_model(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "teachers.bert.model=/nonexistent/bert"
    message = error_of(capsys, monkeypatch, "extract", experiment, "--set", missing)
    assert "bert" in message
    assert "/nonexistent/bert" in message


def test_an_empty_corpus(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = experiment.parent / "empty.jsonl"
    empty.write_text("")
    message = error_of(capsys, monkeypatch, "run", experiment, "--set", f"corpus.path={empty}")
    assert "empty" in message
    assert str(empty) in message


def test_a_text_longer_than_the_teachers_positions(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = experiment.parent / "long.jsonl"
    rows = [{"text": "short"}, {"id": "the-long-one", "text": "many words " * 2000}]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--set", f"corpus.path={long}", "--set", "corpus.eval_samples=0"]
    message = error_of(capsys, monkeypatch, "extract", experiment, "--teacher", "bert", *settings)
    assert "the-long-one" in message
    assert "1024" in message
    assert "long_text" in message


def test_a_teachers_tokenizer_without_offsets(
    experiment: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(models / "bytes")
    other = f"teachers.bert.tokenizer={models / 'bytes'}"
    message = error_of(
        capsys, monkeypatch, "extract", experiment, "--teacher", "bert", "--set", other
    )
    assert "offsets" in message


def test_a_student_that_cannot_be_is_found_before_anything_is_extracted(
    experiment: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from transformers import ByT5Tokenizer

    if not (models / "bytes").exists():
        ByT5Tokenizer().save_pretrained(models / "bytes")
    wrong = {
        f"student.tokenizer={models / 'bytes'}": "offsets",
        "student.architecture.model_type=lama": "lama",
        "student.architecture.model_type=mamba": "mamba",
        "student.architecture.num_key_value_heads=5": "(2, 5, 8, 8)",
    }
    for setting, words in wrong.items():
        assert words in error_of(capsys, monkeypatch, "run", experiment, "--set", setting)
    assert not (experiment.parent / "store").exists()


@pytest.mark.parametrize(
    "command",
    [
        "init {}",
        f"data gsm8k {{}} --from {GSM8K} --max-samples 3",
        "data arithmetic {} --samples 3",
        f"data tokenizer {GSM8K} {{}} --vocab-size 300",
        "inspect {store} --plots {}",
    ],
)
def test_output_that_cannot_be_written(
    command: str, tmp_path: Path, capsys: Any, monkeypatch: Any, build: Any
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "read-only").mkdir(mode=0o555)
    build.store(tmp_path / "store", build.teacher())
    places = [tmp_path / "file/x", Path("/proc/none/x")]
    places += [tmp_path / "read-only/x"] if os.geteuid() else []  # root may write there
    for place in places:
        arguments = command.format(place, store=tmp_path / "store").split()
        message = error_of(capsys, monkeypatch, *arguments)
        assert str(place.parent) in message
        assert "permissions" in message
        assert "free" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_whose_folder_cannot_be(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", Path("/proc/none")):
        with pytest.raises(StoreError, match=f"{folder}/tiny/config.yaml.*permissions"):
            begin(load_experiment(experiment, [f"output_dir={folder}"]))
