"""Runs with a balance between teachers: what is logged, resumed, and shared between ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvdistill.corpus.readers import load_corpus
from kvdistill.pipelines.run_folder import begin
from kvdistill.pipelines.train import build_trainer, train
from kvdistill.store.reader import KVStore
from tests.pipelines.rank_worker import StopAt
from tests.pipelines.test_ranks import ACCUMULATED, run, same_losses
from tests.pipelines.test_train import losses
from tests.pipelines.tiny import variant


def test_a_balanced_run_resumed_equals_one_never_stopped(extracted: Path, tmp_path: Path) -> None:
    settings = {
        "fusion__balance": {
            "method": "gradnorm", "factors": {"bert": 0.5}, "spans": {"llama": [0.2, 1]}
        },
        "fusion__teacher_dropout": 0.2, "projection__hidden": 4, "losses__anneal_by": 1.0,
        "training__max_steps": 5, "training__save_steps": 2, "training__log_steps": 1,
        "training__diagnostic_steps": 1, "training__gradient_accumulation_steps": 2,
    }  # fmt: skip
    whole = train(variant(extracted, tmp_path / "whole", **settings))
    stopped = variant(extracted, tmp_path / "stopped", **settings)
    folder = begin(stopped)
    store, splits = KVStore.open(stopped.store), load_corpus(stopped.corpus)
    trainer = build_trainer(stopped, store, splits, folder)
    trainer.add_callback(StopAt(3))
    trainer.train()
    resumed = train(stopped)
    assert resumed.resumed
    ends = [
        AutoModelForCausalLM.from_pretrained(r.folder / "student").state_dict()
        for r in (whole, resumed)
    ]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
    rows = losses(whole.folder)
    assert rows[0]["balance_bert"] == 0.5
    assert [row["balance_llama"] == 0 for row in rows] == [True, *[False] * 4]
    assert len({row["balance_bert"] for row in rows}) == 5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["explained", "gradnorm", "pcgrad"])
def test_ranks_balance_as_one_process_does(extracted: Path, tmp_path: Path, method: str) -> None:
    balance = {"fusion__balance__method": method}
    one = run(extracted, tmp_path / "1", 1, training__batch_size=6, **ACCUMULATED, **balance)
    for i, flags in enumerate(([], ["fsdp"])):
        settings = {"flags": flags, "training__batch_size": 3, **ACCUMULATED, **balance}
        two = run(extracted, tmp_path / f"2-{i}", 2, **settings)
        assert two["sharded"] == bool(flags)
        same_losses(one, two)
