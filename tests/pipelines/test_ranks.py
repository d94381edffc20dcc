"""Several processes (gloo) train as one does, and go on where another number of them stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.load import dump_experiment, load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.pipelines.run_folder import RunFolder
from tests.pipelines.tiny import variant

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("rank_worker.py")
COMMON = {
    "training__max_steps": None,
    "training__epochs": 1,
    "training__log_steps": 1,
    "training__save_steps": None,
    "training__max_length": 600,
}
ACCUMULATED = {"training__gradient_accumulation_steps": 2}
NORM_BOUNDS = {"float32": 1e-5, "bfloat16": 2e-3}
"""Relative difference of the gradient norm between several processes and one, by precision."""


def run(
    extracted: Path,
    folder: Path,
    ranks: int,
    stop_step: int = 10_000,
    flags: Sequence[str] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Train on some ranks; what they counted, the steps, and the logged rows."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = variant(extracted, folder / "runs", **(COMMON | changes))
    config = folder / "config.yaml"
    config.write_text(dump_experiment(experiment), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [str(WORKER), str(config), str(folder), str(stop_step), *flags]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *command],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(ranks)]
    log = RunFolder(folder / "runs" / experiment.name).log
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "texts": sorted(text for rank in found for text in rank["texts"]),
        "step": found[0]["step"],
        "of": found[0]["of"],
        "rows": [row for row in rows if "loss" in row],
        "counts": [rank["counts"] for rank in found],
        "sharded": found[0]["sharded"],
        "metrics": found[0]["metrics"],
        "evaluations": [(rank["metrics"], rank["scores"]) for rank in found],
    }


def corpus_texts(extracted: Path) -> list[str]:
    return sorted(s.text for s in load_corpus(load_experiment(extracted).corpus).train)


def same_losses(one: dict[str, Any], two: dict[str, Any], norm_bound: float = 1e-5) -> None:
    assert len(one["rows"]) == len(two["rows"]) > 3
    assert two["counts"] == one["counts"] * len(two["counts"])
    for alone, shared in zip(one["rows"], two["rows"], strict=True):
        for part in ("loss", "loss_key", "loss_value", "loss_cross_entropy"):
            assert shared[part] == pytest.approx(alone[part], rel=1e-5), (alone["step"], part)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=norm_bound)


def test_two_processes_train_as_one_does(extracted: Path, tmp_path: Path) -> None:
    """Unequal lengths, accumulation, and a last step of fewer texts."""
    one = run(extracted, tmp_path / "1", 1, training__batch_size=6, **ACCUMULATED)
    two = run(extracted, tmp_path / "2", 2, training__batch_size=3, **ACCUMULATED)
    assert one["texts"] == two["texts"] == corpus_texts(extracted)
    same_losses(one, two)
    assert two["evaluations"][0] == two["evaluations"][1]
    (metrics, rows), (ours, our_rows) = one["evaluations"][0], two["evaluations"][0]
    assert ours == pytest.approx(metrics, rel=1e-4)
    assert [row["sample_id"] for row in our_rows] == [row["sample_id"] for row in rows]


@pytest.fixture(scope="module")
def alone(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, by precision."""
    return {
        precision: run(
            extracted, tmp_path_factory.mktemp(precision), 1,
            training__batch_size=6, training__precision=precision, **ACCUMULATED,
        )
        for precision in NORM_BOUNDS
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", NORM_BOUNDS)
@pytest.mark.parametrize(("ranks", "flags"), [(2, []), (2, ["fsdp"]), (3, []), (3, ["fsdp"])])
def test_processes_train_as_one_does_sharded_or_not_in_any_precision(
    extracted: Path, tmp_path: Path, *, alone: dict[str, Any], ranks: int, flags: list[str],
    precision: str,
) -> None:  # fmt: skip
    """Losses to 1e-5, counts exactly; in bfloat16 gradients add up in another order."""
    many = run(
        extracted, tmp_path, ranks, flags=flags,
        training__batch_size=6 // ranks, training__precision=precision, **ACCUMULATED,
    )  # fmt: skip
    assert many["sharded"] == bool(flags)
    assert many["texts"] == corpus_texts(extracted)
    same_losses(alone[precision], many, NORM_BOUNDS[precision])
    metric = "eval_bits_per_character"
    assert many["metrics"][metric] == pytest.approx(alone[precision]["metrics"][metric], rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_that_stopped_goes_on_as_if_it_had_not(
    extracted: Path, tmp_path: Path
) -> None:
    settings = {"flags": ["fsdp"], "training__batch_size": 3, "training__save_steps": 1}
    whole = run(extracted, tmp_path / "whole", 2, **settings)
    run(extracted, tmp_path / "parts", 2, stop_step=2, **settings)
    parts = run(extracted, tmp_path / "parts", 2, **settings)
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in parts["rows"]] == [row[name] for row in whole["rows"]]
    assert parts["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_a_loss_that_one_rank_finds_broken_ends_all(extracted: Path, tmp_path: Path) -> None:
    """The other waits for no one: it ends by itself, and leaves a message too."""
    with pytest.raises(AssertionError):
        run(extracted, tmp_path, 2, flags=["nan"])
    messages = [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert all("step 2: loss, " in message for message in messages)
    assert "named by another rank" in messages[0]
    assert "samples " in messages[1].partition("infinite")[2]


@pytest.mark.slow
def test_two_processes_fit_the_heads_of_a_pretrained_student_as_one_does(
    extracted: Path, tmp_path: Path
) -> None:
    pretrained = {
        "student": {"model": str(extracted.parent / "models/llama")},
        "training__learning_rate": 1e-3,
        "training__batch_size": 3,  # the pilot's, too
    }
    accumulated = {"training__gradient_accumulation_steps": 2}
    one = run(extracted, tmp_path / "1", 1, **pretrained, **accumulated)
    two = run(extracted, tmp_path / "2", 2, **pretrained)
    assert one["rows"][0]["loss_key"] < 0.5
    same_losses(one, two)


@pytest.mark.slow
def test_two_processes_in_buckets_train_as_one_does(extracted: Path, tmp_path: Path) -> None:
    """A bucket per rank and batch; a rank without a bucket takes part and counts nothing."""
    buckets = {"training__batching": "bucketed", "training__tokens_per_batch": 600}
    steps = "training__gradient_accumulation_steps"
    one = run(extracted, tmp_path / "1", 1, **buckets, **{steps: 4})
    two = run(extracted, tmp_path / "2", 2, **buckets, **{steps: 2})
    assert one["texts"] == two["texts"] == corpus_texts(extracted)
    same_losses(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["plain", "bucketed"])
def test_one_then_two_then_three_processes_read_every_text_once(
    extracted: Path, tmp_path: Path, batching: str
) -> None:
    changes = {
        "training__batching": batching,
        "training__gradient_accumulation_steps": 2,
        "training__save_steps": 1,
    }
    if batching == "bucketed":
        changes["training__tokens_per_batch"] = 600
    seen = []
    for ranks, stop_step in ((1, 3), (2, 5), (3, 10_000)):
        part = run(extracted, tmp_path, ranks, stop_step, **changes)
        seen += part["texts"]
        assert part["step"] == min(stop_step, part["of"])
    assert sorted(seen) == corpus_texts(extracted)
