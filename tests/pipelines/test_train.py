"""Stage 2 end to end: trains, resumes, refuses, and never needs a teacher."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from kvdistill.attention.adapters import PLAIN
from kvdistill.config.load import dump_experiment, load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import (
    ConfigError,
    IncompleteStore,
    NonFiniteError,
    StoreMismatch,
    StoreNotFound,
    StudentError,
)
from kvdistill.pipelines.evaluate import evaluate_folder
from kvdistill.pipelines.run_folder import RunFolder, begin
from kvdistill.pipelines.train import build_trainer, require_trainable_student, train
from kvdistill.store.reader import KVStore
from kvdistill.studies.report.page import write_plots, write_report
from tests.pipelines.tiny import variant


class StopAt(TrainerCallback):
    """Ends training after a step, as a kill would: nothing more is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in RunFolder(folder).log.read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


@pytest.mark.parametrize("mode", ["student_to_teacher", "frozen"])
def test_a_run_trains_and_leaves_an_ordinary_student(
    extracted: Path, tmp_path: Path, mode: str
) -> None:
    report = train(variant(extracted, tmp_path, projection__mode=mode, training__log_steps=1))
    rows = losses(report.folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        parts = 3 * row["loss_key"] + 3 * row["loss_value"] + row["loss_cross_entropy"]
        assert math.isclose(row["loss"], parts, rel_tol=1e-5)
    student = AutoModelForCausalLM.from_pretrained(report.folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(report.folder / "student")
    text = tokenizer("How many", return_tensors="pt")
    assert student(text.input_ids).logits.shape[:2] == text.input_ids.shape
    assert report.metrics["eval_bits_per_character"] > 0
    record = RunFolder(report.folder).read_record()
    assert record["finished"]
    assert record["attempts"][0]["versions"]["torch"] == torch.__version__
    again = train(variant(extracted, tmp_path, projection__mode=mode, training__log_steps=1))
    assert again.already_finished
    assert again.metrics == report.metrics


@pytest.mark.parametrize("mode", ["student_to_teacher", "frozen"])
def test_losses_against_teachers_fade(extracted: Path, tmp_path: Path, mode: str) -> None:
    changes = {"projection__mode": mode, "losses__anneal_by": 0.5, "training__diagnostic_steps": 1}
    report = train(variant(extracted, tmp_path, training__log_steps=1, **changes))
    rows = losses(report.folder)
    for row, scale in zip(rows, [1, 2 / 3, 1 / 3, 0, 0, 0], strict=True):
        of_kv = 3 * row["loss_key"] + 3 * row["loss_value"]
        assert math.isclose(row["loss"], scale * of_kv + row["loss_cross_entropy"], rel_tol=1e-5)
        assert ("gradient_share" in row) == (scale > 0)
    # Told at full weight: a share that fades with its loss would be taken for absorption.
    assert rows[2]["gradient_share"] > 0.5 * rows[0]["gradient_share"]


def test_stage_two_needs_no_teacher_and_imports_no_teacher_code(
    extracted: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_experiment(variant(extracted, tmp_path / "runs")))
    assert not (extracted.parent / "models" / "bert").exists()
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from kvdistill.config.load import load_experiment\n"
        "from kvdistill.pipelines.train import train\n"
        f"train(load_experiment(Path({str(config)!r})))\n"
        "modules = [m for m in sys.modules if m.startswith('kvdistill.extract')]\n"
        "modules += [m for m in sys.modules if m.startswith('transformers.models.bert.model')]\n"
        "print('TEACHER CODE', modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TEACHER CODE []" in done.stdout


def test_a_stopped_run_resumed_equals_one_never_stopped(extracted: Path, tmp_path: Path) -> None:
    changes = {"training__max_steps": None, "training__epochs": 2, "corpus__max_samples": 48}
    changes |= {"losses__anneal_by": 1.0}
    settings = {"training__save_steps": 5, "training__log_steps": 1, **changes}
    whole = train(variant(extracted, tmp_path / "whole", **settings))
    stopped = variant(extracted, tmp_path / "stopped", **settings)
    folder = begin(stopped)
    store, splits = KVStore.open(stopped.store), load_corpus(stopped.corpus)
    trainer = build_trainer(stopped, store, splits, folder)
    trainer.add_callback(StopAt(28))  # an epoch has 22 steps: it stops inside the second
    trainer.train()
    assert folder.checkpoint() == folder.path / "checkpoint-25"
    resumed = train(stopped)
    assert resumed.resumed
    for name, tensor in weights(whole.folder / "student").items():
        assert torch.equal(tensor, weights(resumed.folder / "student")[name]), name
    by_step = {row["step"]: row["loss_key"] for row in losses(whole.folder)}
    assert {row["step"]: row["loss_key"] for row in losses(resumed.folder)} == by_step


def test_a_run_killed_after_its_last_checkpoint_ends_without_another_step(
    extracted: Path, tmp_path: Path
) -> None:
    first = train(variant(extracted, tmp_path))
    before = weights(first.folder / "student")
    folder = RunFolder(first.folder)
    assert folder.checkpoint() == folder.path / "checkpoint-6"
    folder.write_record(folder.read_record() | {"finished": False})
    again = train(variant(extracted, tmp_path))
    assert again.resumed
    assert folder.read_record()["steps"] == 6
    for name, tensor in weights(again.folder / "student").items():
        assert torch.equal(tensor, before[name]), name


def test_a_signal_saves_after_the_step_and_the_same_command_goes_on(
    extracted: Path, tmp_path: Path
) -> None:
    experiment = variant(extracted, tmp_path, training__max_steps=12, training__save_steps=100)

    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    folder = begin(experiment)
    trainer = build_trainer(
        experiment, KVStore.open(experiment.store), load_corpus(experiment.corpus), folder
    )
    before = signal.getsignal(signal.SIGTERM)
    trainer.add_callback(Signal())
    trainer.train()
    assert trainer.stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
    assert folder.checkpoint() == folder.path / "checkpoint-5"
    resumed = train(experiment)
    assert resumed.resumed
    assert RunFolder(resumed.folder).read_record()["steps"] == 12


def test_a_signal_is_exit_code_75(extracted: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    changes = {"training__max_steps": 100_000, "training__log_steps": 1}
    config.write_text(dump_experiment(variant(extracted, tmp_path / "runs", **changes)))
    command = [sys.executable, "-m", "kvdistill.cli", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = RunFolder(tmp_path / "runs" / "tiny").log
    while process.poll() is None and not (log.is_file() and log.read_text()):
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    assert RunFolder(tmp_path / "runs" / "tiny").checkpoint() is not None


def test_a_run_that_blows_up_is_stopped_and_says_where(extracted: Path, tmp_path: Path) -> None:
    wild = {"training__learning_rate": 1e30, "training__log_steps": 1, "training__max_steps": 50}
    with pytest.raises(NonFiniteError, match=r"tiny: step \d+: .* infinite; samples 000000\d\d, "):
        train(variant(extracted, tmp_path, **wild))
    assert not (tmp_path / "tiny" / "student").exists()


def test_cross_entropy_alone_reads_no_teacher(extracted: Path, tmp_path: Path) -> None:
    changes = {"losses__key": 0, "losses__value": 0, "training__log_steps": 1}
    report = train(variant(extracted, tmp_path, **changes))
    assert "loss_key" not in losses(report.folder)[0]
    assert RunFolder(report.folder).diagnostics.read_text() == "{}"


def test_the_report_holds_everything_in_one_page(extracted: Path, tmp_path: Path) -> None:
    logged = {"training__eval_steps": 3, "training__log_steps": 2}
    with_kv = train(variant(extracted, tmp_path, **logged))
    without = train(
        variant(extracted, tmp_path, name="plain", losses__key=0, losses__value=0, **logged)
    )
    page = tmp_path / "report.html"
    write_report([with_kv.folder, without.folder], page)
    text = page.read_text(encoding="utf-8")
    assert text.count("<figure>") > 8
    for words in ("losses.key", "plain", "perplexity", "first training text", "llama", "bert"):
        assert words in text


def test_plots_are_drawn_and_weights_only_where_they_are_learned(
    extracted: Path, tmp_path: Path
) -> None:
    changes = {"fusion__method": "mlp", "fusion__granularity": "layer", "training__log_steps": 1}
    run = train(variant(extracted, tmp_path, training__diagnostic_steps=2, **changes))
    drawn = {path.stem for path in write_plots(run.folder, tmp_path / "plots")}
    curves = {"loss-cross-entropy", "loss-key", "loss-value"}
    taught = {"layer-map", "error-by-layer-key", "error-by-layer-value", "spectra"}
    taught |= {"alignment-llama", "alignment-bert", "loss-key", "loss-value"}
    assert drawn - taught - curves == {"reliability", "weights", "weights-by-layer"}
    assert taught | curves <= drawn
    assert all((tmp_path / "plots" / f"{name}.png").stat().st_size > 5000 for name in drawn)
    ce = {"losses__key": 0, "losses__value": 0, "training__log_steps": 1}
    plain = train(variant(extracted, tmp_path, name="ce", **ce))
    drawn = {path.stem for path in write_plots(plain.folder, tmp_path / "none")}
    assert "loss-cross-entropy" in drawn
    assert not drawn & taught


def test_report_refuses_what_is_no_finished_run(extracted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    folder = begin(variant(extracted, tmp_path))
    with pytest.raises(ConfigError, match="has not finished"):
        write_report([folder.path], tmp_path / "report.html")


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "training.max_length: 64 tokens, but the student .* has 32 positions"),
        (
            {"training__max_length": 32, "training__exact_match_samples": 2},
            "max_new_tokens: expected fewer than the student's 32 positions",
        ),
        (
            {"training__max_length": 32, "latent": {"num_latents": 4, "max_new_tokens": 4},
             "alignment__time": "latent", "projection__mode": "identity"},
            "a question, its latents and answer: .* has 32 positions",
        ),
    ],
)  # fmt: skip
def test_too_few_positions_are_refused_before_the_start(
    extracted: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    experiment = variant(extracted, tmp_path, student__architecture=GPT2, **changes)
    with pytest.raises(StudentError, match=says) as caught:
        train(experiment)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.rglob("training_log.jsonl")]
    if not changes:
        with pytest.raises(StudentError, match=says):
            require_trainable_student(experiment)


def test_texts_longer_than_the_positions_are_not_evaluated(extracted: Path, tmp_path: Path) -> None:
    settings = {"student__architecture": GPT2, "training__max_length": 32, "training__max_steps": 1}
    student = train(variant(extracted, tmp_path, **settings)).folder / "student"
    corpus = Path("examples/data/gsm8k_train.jsonl")
    options: dict[str, Any] = {"max_samples": 2, "batch_size": 2}
    with pytest.raises(StudentError, match=r"--max-length: 64 tokens, but .* 32 positions"):
        evaluate_folder(student, corpus, max_length=64, **options)
    found = evaluate_folder(student, corpus, max_length=32, **options)
    assert found.metrics["num_tokens"] == 2 * 31


def test_a_run_of_another_config_is_not_overwritten(extracted: Path, tmp_path: Path) -> None:
    begin(variant(extracted, tmp_path))
    with pytest.raises(ConfigError, match=r"training\.learning_rate") as caught:
        begin(variant(extracted, tmp_path, training__learning_rate=0.5))
    assert "choose another name" in str(caught.value)


def test_a_run_goes_on_under_a_version_with_more_settings(extracted: Path, tmp_path: Path) -> None:
    folder = begin(variant(extracted, tmp_path))
    lines = folder.config.read_text().splitlines(keepends=True)
    older = [line for line in lines if "spike" not in line and "lora" not in line]
    assert len(older) < len(lines)
    folder.config.write_text("".join(older))
    assert begin(variant(extracted, tmp_path)).path == folder.path


def test_a_store_that_does_not_fit_is_refused_before_training(
    extracted: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreNotFound):
        train(variant(extracted, tmp_path, store=str(tmp_path / "none")))
    with pytest.raises(StoreMismatch, match="corpus"):
        train(variant(extracted, tmp_path, corpus__max_samples=47))
    llama = load_experiment(extracted).teachers["llama"].model
    with pytest.raises(StoreMismatch, match=r"model: stored .*bert', .*llama'"):
        train(variant(extracted, tmp_path, teachers__bert__model=llama))
    with pytest.raises(StoreMismatch, match="codec"):
        train(variant(extracted, tmp_path, extraction__codec={"key": "bf16", "value": "bf16"}))
    with pytest.raises(IncompleteStore, match="third") as caught:
        train(variant(extracted, tmp_path, teachers__third={"model": "x"}))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "tiny").exists()


def test_a_student_that_is_not_read_correctly_is_not_trained(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is verified on the student in hand before the first step."""
    wrong = replace(PLAIN, taps=("k_proj", "k_proj", "v_proj"))
    monkeypatch.setattr("kvdistill.attention.kv_capture.adapters_for", lambda model: [wrong])
    with pytest.raises(StudentError, match=r"type 'llama' cannot be read: .* does not fit"):
        train(variant(extracted, tmp_path))
