"""A corpus of several parts: one store over all of them, each read as often as it weighs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from kvdistill.config.corpus import CorpusConfig
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import ConfigError, CorpusError
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.run_folder import begin
from kvdistill.pipelines.train import build_trainer, require_matching_store
from kvdistill.store.reader import KVStore
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models


def write(path: Path, texts: list[str], task: str | None = None) -> Path:
    rows = [{"text": text} | ({} if task is None else {"task": task}) for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, dict[str, str]]:
    sums = [f"{i} + {i} = {2 * i}" for i in range(10)]
    return {
        "sums": {"path": str(write(tmp_path / "sums.jsonl", sums))},
        "prose": {"path": str(write(tmp_path / "prose.jsonl", ["How many clips?"] * 6, "tale"))},
    }


def test_ids_and_tasks_come_from_the_parts_and_each_holds_out(
    parts: dict[str, dict[str, str]],
) -> None:
    config = CorpusConfig.model_validate({"parts": parts, "eval_samples": 2})
    splits = load_corpus(config)
    assert [s.sample_id for s in splits.train][:2] == ["sums/00000000", "sums/00000001"]
    assert Counter(s.task for s in splits.train) == {"sums": 8, "tale": 4}
    assert [s.sample_id.split("/")[0] for s in splits.evaluation] == ["sums"] * 2 + ["prose"] * 2
    assert len({s.sample_id for s in splits.train}) == 12


def test_a_part_that_is_too_small_is_named(parts: dict[str, dict[str, str]]) -> None:
    config = CorpusConfig.model_validate({"parts": parts, "eval_samples": 6})
    with pytest.raises(CorpusError, match="part 'prose' has only 6"):
        load_corpus(config)


@pytest.mark.parametrize(
    "corpus",
    [
        {"parts": {"a": {"path": "x"}}, "path": "y"},
        {"parts": {"a": {"path": "x", "dataset": "z"}}},
        {"parts": {"a": {"path": "x"}}, "max_samples": 3},
        {},
    ],
)
def test_corpora_that_cannot_be(corpus: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse_experiment({"store": "s", "student": {"model": "m"}, "corpus": corpus})


def test_weights_change_what_is_read_and_not_the_store(
    parts: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    write_models(tmp_path / "models")
    path = write_experiment(tmp_path, tmp_path / "models")
    changes = {
        "corpus": {"parts": parts, "shard_chars": 60},
        "training__max_steps": None,
        "training__save_steps": None,
    }
    extract(variant(path, tmp_path / "runs", **changes))
    weighed = variant(
        path, tmp_path / "runs", training__task_weights={"sums": 0.5, "tale": 3}, **changes
    )
    store, splits = KVStore.open(weighed.store), load_corpus(weighed.corpus)
    require_matching_store(store, weighed, splits)
    trainer = build_trainer(weighed, store, splits, begin(weighed))
    assert trainer.stream.order.num_samples == 5 + 18
    tasks = {number: name for name, number in trainer.stream.collate.tasks.items()}
    for _ in range(2):
        rows = [int(task) for batch in trainer.stream for task in batch["task"]]
        assert Counter(tasks[row] for row in rows) == {"sums": 5, "tale": 18}
