"""What a trainer offers for long runs: schedules, early stop, the best student, spikes, memory."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.targets import LayerTargets
from kvdistill.distill.train import devices as devices_module
from kvdistill.distill.train import set_up as set_up_module
from kvdistill.distill.train import trainer as trainer_module
from kvdistill.distill.train.guards import StepGuard, StepReport
from kvdistill.distill.train.trainer import KVDistillTrainer
from kvdistill.errors import ConfigError
from kvdistill.pipelines.run_folder import RunFolder, begin
from kvdistill.pipelines.train import build_trainer, train
from kvdistill.store.reader import KVStore
from tests.pipelines.test_train import StopAt, losses, weights
from tests.pipelines.tiny import variant


def trainer_of(experiment: Any) -> Any:
    store, splits = KVStore.open(experiment.store), load_corpus(experiment.corpus)
    return build_trainer(experiment, store, splits, begin(experiment))


@pytest.mark.parametrize(
    ("schedule", "warmup", "shape"),
    [
        ("linear", 0, lambda t: 1 - t / 6),
        ("cosine", 2, lambda t: t / 2 if t < 2 else (1 + math.cos(math.pi * (t - 2) / 4)) / 2),
        ("constant", 0, lambda t: 1.0),
        ("constant_with_warmup", 3, lambda t: min(t / 3, 1.0)),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    extracted: Path, tmp_path: Path, schedule: str, warmup: int, shape: Any
) -> None:
    changes = {"training__schedule": schedule, "training__warmup_steps": warmup}
    report = train(
        variant(
            extracted, tmp_path, training__log_steps=1, losses__key=0, losses__value=0, **changes
        )
    )
    rates = [row["learning_rate"] for row in losses(report.folder)]
    assert rates == pytest.approx([1e-3 * shape(step) for step in range(6)])


def test_gradients_are_clipped_and_old_checkpoints_go(extracted: Path, tmp_path: Path) -> None:
    experiment = variant(extracted, tmp_path, training__save_steps=1, training__max_grad_norm=1e-3)
    trainer = trainer_of(experiment)
    norms: list[float] = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    trainer.add_callback(Norms())
    trainer.train()
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2)
    kept = sorted(path.name for path in (tmp_path / "tiny").glob("checkpoint-*"))
    assert kept == ["checkpoint-5", "checkpoint-6"]


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Evaluations that find what a script says, by step."""
    real = KVDistillTrainer._score

    def score(self: Any, prefix: str) -> dict[str, float]:
        value = values[min(self.state.global_step, len(values)) - 1]
        return real(self, prefix) | {f"{prefix}_bits_per_character": value}

    monkeypatch.setattr(KVDistillTrainer, "_score", score)


PATIENT = {
    "training__max_steps": 12, "training__eval_steps": 1, "training__save_steps": 1,
    "training__keep_checkpoints": 20, "training__early_stop_patience": 3,
    "training__keep_best": True,
}  # fmt: skip


@pytest.mark.parametrize("killed_at", [None, 4])
def test_training_ends_with_patience_and_the_best_student_is_kept(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int | None
) -> None:
    scripted(monkeypatch, [5.0, 3.0, 3.5, 3.0, 4.0, 1.0])
    experiment = variant(extracted, tmp_path, **PATIENT)
    if killed_at is not None:
        trainer = trainer_of(experiment)
        trainer.add_callback(StopAt(killed_at))
        trainer.train()
    report = train(experiment)
    record = RunFolder(report.folder).read_record()
    assert record["steps"] == 5
    assert record["best"] == {"step": 2, "value": 3.0, "since": 3}
    final = weights(report.folder / "student")
    best, last = (weights(report.folder / f"checkpoint-{step}") for step in (2, 5))
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert not all(torch.equal(final[name], last[name]) for name in last)
    assert not (report.folder / "best").exists()


def test_the_last_student_stays_where_it_is_the_best(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    report = train(variant(extracted, tmp_path, **PATIENT | {"training__max_steps": 6}))
    assert RunFolder(report.folder).read_record()["best"]["step"] == 6
    final, last = weights(report.folder / "student"), weights(report.folder / "checkpoint-6")
    assert all(torch.equal(final[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training__keep_best": True}, "eval_steps"),
        ({"training__early_stop_patience": 1, "training__eval_steps": 1,
          "corpus__eval_samples": 0}, "held-out"),
        ({"training__keep_best": True, "training__eval_steps": 1,
          "training__best_metric": "exact_match"}, "exact_match_samples"),
        ({"training__schedule": "constant", "training__warmup_steps": 5}, "constant_with_warmup"),
        ({"student__lora": {"rank": 2}}, "pretrained"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(
    extracted: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        variant(extracted, tmp_path, **changes)


def test_a_spike_can_be_left_out(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spikes: list[bool] = []
    real = StepGuard.check

    def check(self: Any, *args: Any, **options: Any) -> StepReport:
        report = real(self, *args, **options)
        spikes.append(report.spike)
        return report

    monkeypatch.setattr(StepGuard, "check", check)
    settings = {"training__spike_factor": 1.0001, "training__skip_spikes": True}
    trainer = trainer_of(variant(extracted, tmp_path, training__max_steps=20, **settings))
    moved: list[bool] = []
    weight = trainer.model.student.model.layers[0].mlp.up_proj.weight
    last = weight.detach().clone()

    class Moved(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            moved.append(not torch.equal(weight, last))
            last.copy_(weight.detach())

    trainer.add_callback(Moved())
    trainer.train()
    assert True in spikes
    assert moved == [not spike for spike in spikes]


def test_checkpointed_activations_train_the_same_student(extracted: Path, tmp_path: Path) -> None:
    """A first pass whose KV is read, a second one that is injected into, twice per step."""
    changes = {
        "losses__inject": 1.0, "projection__mode": "task", "training__log_steps": 1,
        "training__diagnostic_steps": 2, "training__gradient_accumulation_steps": 2,
    }  # fmt: skip
    plain = train(variant(extracted, tmp_path / "plain", **changes))
    saving = train(
        variant(extracted, tmp_path / "saving", training__gradient_checkpointing=True, **changes)
    )
    for ours, theirs in zip(losses(plain.folder), losses(saving.folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["loss_inject"] == pytest.approx(theirs["loss_inject"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    one, other = (
        AutoModelForCausalLM.from_pretrained(run.folder / "student") for run in (plain, saving)
    )
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_a_compiled_student_trains_the_same(extracted: Path, tmp_path: Path) -> None:
    """With the compiler itself, whose rounding is its own; figures walk a graph twice."""
    changes = {"training__log_steps": 1, "training__diagnostic_steps": 2}
    plain = train(variant(extracted, tmp_path / "plain", **changes))
    compiled = train(variant(extracted, tmp_path / "compiled", training__compile=True, **changes))
    for ours, theirs in zip(losses(plain.folder), losses(compiled.folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)


def test_a_run_by_the_fused_kernel_has_the_same_losses(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    changes = {"training__max_steps": 3, "training__log_steps": 1}
    plain = train(variant(extracted, tmp_path / "plain", **changes))
    record = RunFolder(plain.folder).read_record()
    assert record["compared"] == "unfused: it needs a GPU"
    monkeypatch.setattr(set_up_module, "kernel_fault", lambda device: None)
    placed: list[int] = []
    place = LayerTargets.__call__

    def counted(targets: Any, row: int) -> Any:
        placed.append(row)
        return place(targets, row)

    monkeypatch.setattr(LayerTargets, "__call__", counted)
    monkeypatch.setattr(LayerTargets, "stacked", None)  # nor do all layers' targets exist at once
    fused = trainer_of(variant(extracted, tmp_path / "fused", **changes))
    fused.train()
    assert len(placed) == 2 * 2 * 2  # layers, kinds, teachers: for the figures of the first step
    record = RunFolder(tmp_path / "fused/tiny").read_record()
    assert record["compared"] == "by the fused kernel"
    pairs = zip(losses(tmp_path / "fused/tiny"), losses(plain.folder), strict=True)
    for ours, theirs in pairs:
        for name in ("loss", "grad_norm", "loss_key", "loss_value"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"training__fused_kernels": False}, "training.fused_kernels is false"),
        ({"projection__mode": "joint"}, "projection.mode is joint"),
        ({"losses__inject": 1}, "losses.inject needs all layers"),
        ({"losses__cosine": 1}, "losses.cosine needs all layers"),
        ({"losses__relation": 1}, "losses.relation needs all layers"),
    ],
)
def test_what_the_kernel_does_not_serve_is_named(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, why: str | None
) -> None:
    monkeypatch.setattr(set_up_module, "kernel_fault", lambda device: None)
    experiment = variant(extracted, tmp_path, **change)
    trainer = trainer_of(experiment)
    assert experiment.unfused == why
    heads = trainer.model.heads_of("key")
    assert {head.is_fused for head in heads} == {why is None}
    if experiment.training.fused_kernels:
        assert (why is None) == (not trainer.model.needs_all_layers)
    trainer.close()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluation_has_the_precision_of_training(
    extracted: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    score = trainer_module.score_held_out

    def scored(student: Any, *args: Any, **rest: Any) -> Any:
        head = student.get_output_embeddings()
        hook = head.register_forward_hook(lambda _, __, logits: seen.append(logits.dtype))
        try:
            return score(student, *args, **rest)
        finally:
            hook.remove()

    monkeypatch.setattr(trainer_module, "score_held_out", scored)
    train(variant(extracted, tmp_path, training__max_steps=1, training__precision=precision))
    assert {*seen} == {getattr(torch, precision)}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_resumed_run_keeps_the_precision_that_it_began_with(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    experiment = variant(extracted, tmp_path, training__max_steps=1)
    folder = begin(experiment)
    if not recorded:  # written before the default was `auto`
        text = folder.config.read_text().replace("precision: auto", "precision: float32")
        folder.config.write_text(text)
    parts = KVStore.open(experiment.store), load_corpus(experiment.corpus)
    assert not build_trainer(experiment, *parts, folder).args.bf16
    monkeypatch.setattr(devices_module, "chosen_precision", lambda training: "bfloat16")
    again = build_trainer(experiment, *parts, begin(experiment))
    assert not again.args.bf16
    assert again.experiment.training.precision == "float32"
    new = variant(extracted, tmp_path / "new", training__max_steps=1)
    trainer = build_trainer(new, *parts, begin(new))
    assert trainer.args.bf16
    assert trainer.experiment.training.precision == "bfloat16"


def test_a_run_of_before_dtype_auto_goes_on(extracted: Path, tmp_path: Path) -> None:
    folder = begin(variant(extracted, tmp_path))
    folder.config.write_text(folder.config.read_text().replace("dtype: auto", "dtype: float32"))
    begin(variant(extracted, tmp_path))
    with pytest.raises(ConfigError, match=r"llama\.dtype='float32', this config has 'bfloat16'"):
        begin(variant(extracted, tmp_path, teachers__llama__dtype="bfloat16"))


def test_every_line_of_the_log_is_a_number(extracted: Path, tmp_path: Path) -> None:
    report = train(variant(extracted, tmp_path, training__log_steps=1, training__eval_steps=3))
    for line in RunFolder(report.folder).log.read_text().splitlines():
        assert all(isinstance(value, int | float) for value in json.loads(line).values())
