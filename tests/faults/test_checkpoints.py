"""Checkpoints are whole or skipped; a full disk is one line, and costs nothing already saved."""

from __future__ import annotations

import errno
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvdistill.config.load import dump_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import ConfigError, RunFolderError, StoreError, StudentError
from kvdistill.pipelines.run_folder import RunFolder, begin
from kvdistill.pipelines.train import build_trainer, train
from kvdistill.store import commit
from kvdistill.store.reader import KVStore
from tests.pipelines.test_train import StopAt, weights
from tests.pipelines.tiny import variant

SETTINGS = {"training__save_steps": 2, "training__keep_checkpoints": 3}


@pytest.fixture(scope="module")
def killed(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that was killed after the fifth."""
    experiment = variant(extracted, tmp_path_factory.mktemp("killed"), **SETTINGS)
    store, splits = KVStore.open(experiment.store), load_corpus(experiment.corpus)
    trainer = build_trainer(experiment, store, splits, folder := begin(experiment))
    trainer.add_callback(StopAt(5))
    trainer.train()
    return folder.path


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_checkpoint_with_any_damaged_file_is_skipped(
    killed: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert RunFolder(killed).checkpoint() == killed / "checkpoint-4"
    names = [path.name for path in (killed / "checkpoint-4").iterdir()]
    assert {"model.safetensors", "projectors.safetensors", "optimizer.pt", "scheduler.pt"} < {
        *names
    }
    for name in names:
        run = tmp_path / name
        shutil.copytree(killed, run)
        damage(run / "checkpoint-4" / name, how)
        caplog.clear()
        assert RunFolder(run).checkpoint() == run / "checkpoint-2", name
        assert str(run / "checkpoint-4") in caplog.text
        assert name in caplog.text


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    extracted: Path, killed: Path, tmp_path: Path
) -> None:
    whole = train(variant(extracted, tmp_path / "whole", **SETTINGS))
    run = tmp_path / "runs" / killed.name
    shutil.copytree(killed, run)
    damage(run / "checkpoint-4/optimizer.pt", "delete")
    experiment = variant(extracted, tmp_path / "runs", **SETTINGS)
    (run / "config.yaml").write_text(dump_experiment(experiment))
    resumed = train(experiment)
    assert resumed.resumed
    for name, tensor in weights(whole.folder / "student").items():
        assert torch.equal(tensor, weights(resumed.folder / "student")[name]), name


@pytest.mark.parametrize("most", [2_000, 20_000, 60_000])
def test_a_disk_that_is_full_is_one_line(extracted: Path, tmp_path: Path, most: int) -> None:
    """A limit on the size of files fails writes as a full disk does, in every library."""
    experiment = variant(extracted, tmp_path, **SETTINGS)
    begin(experiment)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises((RunFolderError, StoreError)) as caught:
            train(experiment)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert train(experiment).metrics


def test_a_write_that_fails_as_a_file_is_closed_is_one_line(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bytes are written by the C++ library's stream, which has its own words for it."""
    experiment = variant(extracted, tmp_path, **SETTINGS)

    def fail(*_: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization._open_zipfile_writer_file, "__exit__", fail)
        with pytest.raises(RunFolderError, match=r"cannot be written \(basic_ios") as caught:
            train(experiment)
    assert str(tmp_path) in str(caught.value)
    assert train(experiment).metrics


def test_files_of_a_run_are_whole_or_absent(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = variant(extracted, tmp_path)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(commit, "flush", full)
        with pytest.raises(StoreError, match=r"config.yaml: No space left"):
            begin(experiment)
    assert not [*tmp_path.rglob("*.*")]
    folder = begin(experiment)
    folder.record.write_text(folder.record.read_text()[:20])
    with pytest.raises(ConfigError, match=r"run.json: expected a JSON object") as caught:
        begin(experiment)
    assert "\n" not in str(caught.value)
    folder.record.unlink()
    folder.config.write_text("")  # as an earlier version left it on a full disk
    assert begin(experiment).config.read_text()


def test_a_damaged_best_student_is_not_taken_for_the_result(
    extracted: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"training__eval_steps": 2, "training__keep_best": True}
    experiment = variant(extracted, tmp_path, **SETTINGS | changes)
    store, splits = KVStore.open(experiment.store), load_corpus(experiment.corpus)
    trainer = build_trainer(experiment, store, splits, folder := begin(experiment))
    trainer.train()
    assert trainer.evaluate_best()
    damage(folder.best / "model.safetensors", "flip")
    with pytest.raises(StudentError, match=r"best.*model.safetensors does not match"):
        trainer.evaluate_best()
