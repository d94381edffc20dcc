"""A LoRA student in a whole run: it resumes bit by bit, and ends as an ordinary model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.student.lora import ADAPTER_FOLDER
from kvdistill.pipelines.run_folder import begin
from kvdistill.pipelines.train import build_trainer, train
from kvdistill.store.reader import KVStore
from tests.pipelines.test_train import StopAt, losses, weights
from tests.pipelines.tiny import variant

pytest.importorskip("peft")


def test_a_lora_run_resumes_and_leaves_a_merged_model_and_its_adapter(
    extracted: Path, tmp_path: Path
) -> None:
    model = str(extracted.parent / "models" / "llama")
    student = {"model": model, "lora": {"rank": 2, "dropout": 0.1}}
    changes = {
        "student": student, "training__log_steps": 1, "training__save_steps": 3,
        "training__learning_rate": 1e-3, "losses__key": 3.0, "projection__init": "grouped_mean",
    }  # fmt: skip
    whole = train(variant(extracted, tmp_path / "whole", **changes))
    stopped = variant(extracted, tmp_path / "stopped", **changes)
    trainer = build_trainer(
        stopped, KVStore.open(stopped.store), load_corpus(stopped.corpus), begin(stopped)
    )
    trainer.add_callback(StopAt(4))
    trainer.train()
    resumed = train(stopped)
    assert resumed.resumed
    ours, theirs = weights(whole.folder / "student"), weights(resumed.folder / "student")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.metrics["eval_nll"] == whole.metrics["eval_nll"]
    first = AutoModelForCausalLM.from_pretrained(model).state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], first[name])}
    assert changed
    assert all("proj" in name for name in changed)
    assert (whole.folder / "student" / ADAPTER_FOLDER / "adapter_config.json").is_file()
    assert losses(whole.folder)[-1]["loss_key"] < losses(whole.folder)[0]["loss_key"]
