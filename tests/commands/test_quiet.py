"""What a run prints: a summary, progress, what was learned, and nothing that needs no action."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kvdistill.cli import QUIET, quieten
from kvdistill.commands import extract as extracting
from kvdistill.pipelines.outlook import outlook
from kvdistill.pipelines.run_folder import RunFolder, begin, learned
from kvdistill.pipelines.train import train
from kvdistill.store.reader import KVStore
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models


@pytest.mark.parametrize("name", QUIET)
def test_every_quieted_message_is_one_that_transformers_has(name: str) -> None:
    modules = (name, "transformers.utils.loading_report")  # the latter uses others' loggers
    source = "".join(inspect.getsource(importlib.import_module(module)) for module in modules)
    for pattern in QUIET[name].split("|"):
        assert pattern in source


def test_other_messages_of_the_same_loggers_pass(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    kept = list(logger.filters)
    quieten()
    try:
        with caplog.at_level(logging.WARNING, logger=logger.name):
            caplog.handler.addFilter(lambda record: True)
            logger.addHandler(caplog.handler)
            logger.warning("BertModel LOAD REPORT from: x")
            logger.warning("Flash attention is not installed")
    finally:
        logger.removeHandler(caplog.handler)
        logger.filters[:] = kept
    assert {record.getMessage() for record in caplog.records} == {
        "Flash attention is not installed"
    }


def test_a_run_into_a_log_has_a_line_per_shard_and_no_report_of_weights(
    tmp_path: Path, programs: Path
) -> None:
    from transformers import BertConfig, BertForMaskedLM

    write_models(tmp_path / "models")
    config = BertConfig.from_pretrained(tmp_path / "models/bert")
    BertForMaskedLM(config).save_pretrained(tmp_path / "models/bert")  # heads, and no pooler
    path = write_experiment(tmp_path, tmp_path / "models")
    body = yaml.safe_load(path.read_text())
    body["student"] = {"model": str(tmp_path / "models/llama")}
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    done = subprocess.run(
        [programs / "kvdistill", "run", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shards = re.findall(r"^(llama|bert) \d+/(\d+) shard", done.stderr, re.MULTILINE)
    assert len(shards) == 2 * int(shards[0][1])
    others = [line for line in done.stderr.splitlines() if " shard " not in line]
    assert not [x for x in others if re.search(r"REPORT|MISSING|Loading|transformers\]|\r", x)]
    assert len(others) <= 1, others  # the bar of training, once
    assert "  held-out bits per character: " in done.stdout
    check_outlook(done.stdout.splitlines(), KVStore.open(tmp_path / "store"))


def check_outlook(lines: list[str], store: KVStore) -> None:
    """What was announced is what the store then holds."""
    assert re.fullmatch(r"corpus: 44 samples, [\d,]+ characters, \d+ shards", lines[0])
    assert lines[1].startswith("teacher llama: 3 layers × 2 KV heads of 16, about ")
    assert lines[2].startswith("teacher bert: 2 layers × 3 KV heads of 8, about ")
    for name, line in zip(("llama", "bert"), lines[1:3], strict=True):
        arrays = [store.read_shard(name, shard_id).arrays for shard_id in store.shard_ids]
        tokens = sum(len(store.token_table(name, i).segment) for i in store.shard_ids)
        kept = [x.nbytes for found in arrays for key, x in found.items() if "importance" not in key]
        assert f"about {tokens:,} tokens, " in line
        size, unit = re.search(r"tokens, ([\d.,]+) (k|M)B as int8$", line).groups()
        assert float(size) * {"k": 1e3, "M": 1e6}[unit] == pytest.approx(sum(kept), rel=0.1)
    assert lines[3].startswith("student: llama, from ")
    assert re.match("time: very roughly .* to extract and .* to train", lines[6])


def test_the_outlook_needs_no_teacher_that_is_done(extracted: Path, tmp_path: Path) -> None:
    lines = list(outlook(variant(extracted, tmp_path)))  # one of the models has been removed
    assert [line.split(": ")[1][:3] for line in lines if line.startswith("teacher ")] == ["all"] * 2
    assert re.match("time: very roughly [^a]* to train", lines[-1])


def test_the_rate_counts_from_the_first_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((10.0, 12.0, 12.0))
    monkeypatch.setattr(extracting.time, "monotonic", lambda: next(clock))
    news = {"teacher": "a", "shard_id": "0", "shards_done": 1, "shards_total": 2}
    with extracting.extraction_progress() as progress:
        for tokens, committed in ((500, False), (300, False), (0, True)):
            progress(SimpleNamespace(**news, tokens=tokens, committed=committed))
    assert capsys.readouterr().err == "a 1/2 shard 0 committed, 150 tokens/s\n"


def test_what_was_learned_is_compared_with_earlier_and_with_text_alone(
    extracted: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    changes = {"training__max_steps": 2, "training__eval_steps": 1, "name": "both"}
    first = train(variant(extracted, runs, **changes))
    assert "without teachers" not in learned(RunFolder(first.folder))["perplexity"]
    text = {"losses__key": 0, "losses__value": 0}
    alone = train(variant(extracted, runs, **changes | {"name": "text"}, **text))
    other = {"name": "longer", "training__max_steps": 3, "training__eval_steps": 3}
    train(variant(extracted, runs, **changes | other, **text))  # of other steps: no comparison
    found = learned(RunFolder(first.folder))
    assert set(found) == {"perplexity", "bits per character"}
    figure = alone.metrics["eval_bits_per_character"]
    assert found["bits per character"].endswith(f"{figure:.4g} without teachers in text)")
    assert " after 1 steps; " in found["bits per character"]
    assert "without" not in learned(RunFolder(alone.folder))["perplexity"]


def test_a_rank_that_is_faster_than_the_one_that_writes_shows_no_figures(
    extracted: Path, tmp_path: Path
) -> None:
    folder = begin(variant(extracted, tmp_path))
    assert learned(folder) == {}
