"""``transformers.Trainer`` for a ``Distiller``.

The Trainer brings mixed precision, accumulation, DDP, FSDP, DeepSpeed, schedulers, logging and
checkpoint rotation. This chapter adds a ``KVStream`` whose epochs may differ in length, losses
divided by token counts summed over accumulation steps and ranks, a log of every loss part, a
separate learning rate for projectors, evaluation on held-out samples, and checkpoints that hold
the student as an ordinary Hugging Face folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils.logging import disable_progress_bar

from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.data.stream import KVStream, steps_left
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.evaluate.held_out import HeldOut, score_held_out, score_latent
from kvdistill.distill.losses.absorption import AbsorptionMonitor, gradient_share
from kvdistill.distill.losses.weighting import annealed_scale
from kvdistill.distill.train.callbacks import TRACKERS, HumanLog
from kvdistill.distill.train.checkpoint import (
    GUARD,
    STREAM,
    STUDENT_PREFIX,
    gathered,
    load_weights,
    save_weights,
)
from kvdistill.distill.train.devices import (
    OpaqueMapping,
    Staging,
    keep_precision,
    known_padding,
    to_device,
)
from kvdistill.distill.train.guards import Best, StepGuard, StopOnSignal, best_of
from kvdistill.distill.train.run_batches import PLACEHOLDER, EpochAccounting, RunBatches
from kvdistill.errors import CorpusError, StudentError
from kvdistill.store.commit import commit_folder, folder_fault, replace_folder, staged_name

log = logging.getLogger(__name__)

BEST: Final = "best"
"""Folder of the best student so far, beside the checkpoints."""


class KVDistillTrainer(Trainer):  # type: ignore[misc]
    """Trains a ``Distiller`` on a ``KVStream``.

    Two private methods of the Trainer are overridden, because no public one is called at that
    point; ``pyproject.toml`` bounds transformers, and ``tests/distill/train/
    test_trainer_contract.py`` compares their signatures:

    ``_get_grad_norm``          the only place before the optimizer step that has the norm before
                                clipping
    ``_load_from_checkpoint``   the Trainer's own looks for the distiller's state in
                                ``model.safetensors``, which holds the student alone
    """

    def __init__(
        self,
        distiller: Distiller,
        *,
        stream: KVStream,
        tokenizer: Any,
        experiment: Experiment,
        arguments: TrainingArguments,
        evaluation: Sequence[Sample],
        callbacks: list[Any] | None = None,
    ) -> None:
        self.stream, self.experiment, self.evaluation = stream, experiment, evaluation
        self.optimizer: Any = None
        self.control: Any = None
        self._parts: dict[str, float] = {}
        self._parts_since = 0
        self._figures: dict[str, float] = {}
        self._figures_step = -1
        self._monitor = AbsorptionMonitor()
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.before_saving: Callable[[], None] = lambda: None
        self._counted: dict[str, Any] = {}
        self.held_out = HeldOut({}, [])
        self.guard = StepGuard(experiment.name, experiment.training.spike_factor)
        module: Any = distiller
        # The layers that FSDP wraps one by one.
        module._no_split_modules = getattr(module.student, "_no_split_modules", None)
        super().__init__(
            model=distiller,
            args=arguments,
            train_dataset=stream,
            eval_dataset=list(evaluation),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        keep_precision(self.accelerator)
        stream.stage = Staging(distiller.count, self.args.device)
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.remove_callback(PrinterCallback)  # JsonLines and ProgressBar replace it
        disable_progress_bar()  # transformers shows one per saved checkpoint
        # compute_loss divides by the token counts of the whole step, not of one micro-batch.
        self.model_accepts_loss_kwargs = True

    @property
    def distiller(self) -> Any:
        """The distiller without DDP or mixed-precision wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """Train to the last step, from the start or from a checkpoint folder."""
        steps_done, accumulation = 0, self.args.gradient_accumulation_steps
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            steps_done = _read_json(folder / TRAINER_STATE_NAME)["global_step"]
            place = _read_json(folder / STREAM)
            self._counted = place.pop("counted", {"num_labels": 1.0, "num_served": 1.0})
            self.stream.load_state_dict(place, batches_per_step=accumulation)
            if (folder / GUARD).is_file():
                self.guard.load_state_dict(_read_json(folder / GUARD))
        self._parts, self._parts_since = {}, steps_done
        training = self.experiment.training
        self.args.max_steps = training.max_steps or steps_done + steps_left(
            self.stream, training.epochs, accumulation
        )
        self._batches = RunBatches(
            self.stream, accumulation, steps_done=steps_done, max_steps=self.args.max_steps
        )
        self.remove_callback(EpochAccounting)
        self.add_callback(EpochAccounting(self._batches))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """This rank's whole batches, as the stream makes them."""
        return DataLoader(self._batches, batch_size=None, collate_fn=lambda batch: batch)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Micro-batches of one step, and the step's token counts over all ranks.

        The counts of all micro-batches move with the first of them.
        """
        batches: list[Any] = list(islice(epoch_iterator, num_batches))
        found = [batch for batch in batches if PLACEHOLDER not in batch]
        if not found:
            return batches, {}
        names = list(found[0]["counts"])
        for name in names:
            found[0]["counts"][name] += sum(batch["counts"][name] for batch in found[1:])
        first = to_device(found[0], device)
        batches[-len(found)] = first  # placeholders come before
        counts = self.accelerator.reduce(torch.stack([first["counts"][n] for n in names]), "sum")
        for name, count in zip(names, counts, strict=True):
            self._counted[name] = self._counted.get(name, 0.0) + count
        return batches, OpaqueMapping(dict(zip(names, counts, strict=True)))

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward pass of one micro-batch; nothing for a placeholder."""
        if PLACEHOLDER in inputs:
            return torch.zeros((), device=self.args.device)
        if not isinstance(inputs, OpaqueMapping):
            inputs = to_device(inputs, self.args.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's share of the step's weighted loss."""
        figures = self._figures_are_due()
        if self.model.training and self.stream.collate.teachers:
            distiller = self.distiller
            distiller.weigh.routing = self.state.global_step >= self.experiment.fusion.warmup_steps
            distiller.weigh.balance.progress = self.state.global_step / self.state.max_steps
            distiller.kv_scale = annealed_scale(
                self.state.global_step, self.state.max_steps, self.experiment.losses.anneal_by
            )
        # A latent student runs on parts of the batch, padded each in its own way.
        known = nullcontext() if self.experiment.latent else known_padding(inputs["padded"])
        with known, self.accelerator.autocast():  # accelerate gives none to a model under FSDP
            output = model(inputs, num_items_in_batch, figures=figures)
        if self.model.training:
            parts = {"loss": output["loss"], **output["parts"]}
            self.guard.record(inputs.get("sample_ids", ()), parts)
        if figures:
            self._figures = self._read_figures(output)
        # Data parallelism averages gradients over ranks; the counts are already global.
        loss = output["loss"] * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every part of the loss, as its mean per step since the last log."""
        if "loss" in logs and self._parts:
            steps = max(self.state.global_step - self._parts_since, 1)
            for name, total in self._parts.items():
                logs[name if name == "loss" else f"loss_{name}"] = total / steps
            self._parts, self._parts_since = {}, self.state.global_step
            logs |= self._figures
            self._figures = {}
        super().log(logs, start_time)

    def require_taught(self) -> None:
        """Refuse a run whose losses had nothing to be computed from, at any step.

        Raises:
            CorpusError: no token was predicted, or none was covered by a teacher.
        """
        fault = None
        if self.experiment.losses.cross_entropy and not self._counted.get("num_labels", 1):
            fault = "no token was predicted; raise training.max_length, or train on prompts too"
        elif self.experiment.latent is None and not self._counted.get("num_served", 1):
            fault = "no token was covered by a teacher; raise training.max_length, check alignment"
        if fault is not None:
            raise CorpusError(f"{self.experiment.name}: in {self.state.global_step} steps {fault}")

    def abort(self, reason: str) -> None:
        """Log why training failed, and let callbacks release their resources."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HumanLog):
                callback.write(reason)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def close(self) -> None:
        """Close the logs of the run, after its last evaluation."""
        for callback in self.callback_handler.callbacks:
            if type(callback) in TRACKERS.values():
                callback.close()

    def _figures_are_due(self) -> bool:
        """True once per ``diagnostic_steps`` steps, on the first micro-batch of the step."""
        step, every = self.state.global_step, self.experiment.training.diagnostic_steps
        if not self.model.training or step == self._figures_step or step % every:
            return False
        self._figures_step = step
        return True

    def _read_figures(self, output: dict[str, Any]) -> dict[str, float]:
        """Fusion weights, target variance, explained variance and gradient share, for the log."""
        if not output["figures"]:
            return {}
        distiller = self.distiller
        figures = dict(output["figures"])
        weights = zip(distiller.teachers, figures.pop("alpha"), strict=True)
        found = {f"weight_{teacher.name}": float(weight) for teacher, weight in weights}
        watched = {"target_variance": float(figures.pop("target_variance"))}
        found |= {name: float(value) for name, value in figures.items()}
        if output["kv"].requires_grad and distiller.kv_scale and not self.is_fsdp_enabled:
            student = [p for p in distiller.student.parameters() if p.requires_grad]
            # Before annealing: a share that shrinks with the loss weight is no sign of absorption.
            watched["gradient_share"] = gradient_share(
                output["kv"] / distiller.kv_scale, output["loss"] - output["kv"], student
            )
        for warning in self._monitor.update(**watched):
            log.warning(warning)
        return found | watched

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Refuse a non-finite loss or gradient, and drop the gradients of a spike if configured."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            # That of a sharded model is a DTensor, whose local value is not the norm.
            norm = getattr(norm, "full_tensor", lambda: norm)()
            norm = torch.as_tensor(norm, device=self.args.device)
        report = self.guard.check(
            self.state.global_step + 1,
            norm,
            lambda sums: self.accelerator.reduce(sums, "sum"),
            stop=self.stop.name is not None,
            may_overflow=self.args.fp16,  # its scaler skips steps with infinite gradients itself
        )
        self.stop.agreed |= report.stop
        if self.stream.collate.teachers:
            reduce = partial(self.accelerator.reduce, reduction="sum")
            self.distiller.weigh.balance.end_step(reduce)
        for name, value in report.parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value
        if report.spike and self.experiment.training.skip_spikes:
            log.warning("step %d is skipped", self.state.global_step + 1)
            model.zero_grad(set_to_none=True)
        return report.grad_norm

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Score the student on the held-out samples; cached for the current step.

        ``held_out`` keeps the last evaluation.
        """
        step, named = self._evaluated
        if step == self.state.global_step:
            return named
        named = self._score(metric_key_prefix)
        self._evaluated = (self.state.global_step, named)
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        self._keep_best_or_stop()
        return named

    def evaluate_best(self) -> dict[str, float]:
        """Load the best student that was kept, and evaluate it."""
        folder = Path(self.args.output_dir) / BEST
        if (fault := folder_fault(folder)) is not None:
            raise StudentError(
                f"{folder}, the best student of the run: {fault}; train it again under another name"
            )
        load_weights(self.distiller, folder)
        return self._score("eval")

    def _score(self, prefix: str) -> dict[str, float]:
        """Held-out likelihood and exact match; of a latent student exact match alone."""
        training, latent = self.experiment.training, self.experiment.latent
        limits: dict[str, Any] = {"batch_size": training.batch_size}
        answers, distiller = training.exact_match_samples, self.distiller
        inputs = (distiller.student, self.processing_class, self.evaluation)
        with self.accelerator.autocast(), gathered(distiller):
            if latent is not None:
                limits |= {"answer": answers or None, "max_new_tokens": latent.max_new_tokens}
                self.held_out = score_latent(*inputs, **limits)
            else:
                limits |= {"answer": answers, "max_new_tokens": training.max_new_tokens}
                self.held_out = score_held_out(*inputs, max_length=training.max_length, **limits)
        return {f"{prefix}_{key}": value for key, value in self.held_out.metrics.items()}

    @property
    def best(self) -> Best | None:
        """The best evaluation so far; None where the config compares none."""
        training = self.experiment.training
        found = best_of(self.state.log_history, training.best_metric)
        return found if training.chooses_best else None

    def _keep_best_or_stop(self) -> None:
        """Save the student if it is the best so far; stop training when patience runs out."""
        training, best = self.experiment.training, self.best
        if best is None:
            return
        if training.keep_best and best.step == self.state.global_step:
            self.save_whole(Path(self.args.output_dir) / BEST)
        patience = training.early_stop_patience
        if patience is not None and best.since >= patience:
            self.control.should_training_stop = True
            log.warning(
                "%s: no better %s in %d evaluations since step %d; training ends at step %d",
                self.experiment.name, training.best_metric, best.since, best.step,
                self.state.global_step,
            )  # fmt: skip

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW that decays matrices alone; all but the student has its own learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decaying = set(self.get_decay_parameter_names(model))
            student_rate = self.args.learning_rate
            other_rate = self.experiment.projection.learning_rate or student_rate
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    decay = self.args.weight_decay if name in decaying else 0.0
                    rate = student_rate if name.startswith(STUDENT_PREFIX) else other_rate
                    groups.setdefault((decay, rate), []).append(parameter)
            self.optimizer = kind(
                [{"params": p, "weight_decay": d, "lr": lr} for (d, lr), p in groups.items()],
                **options,
            )
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as a Hugging Face folder, with projectors, guard and stream state."""
        self.before_saving()
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_weights(self.distiller, self.processing_class, folder, state)
            (folder / GUARD).write_text(json.dumps(self.guard.state_dict()), encoding="utf-8")
            counted = {name: float(total) for name, total in self._counted.items()}
            place = self.stream.state_dict() | {"counted": counted}
            (folder / STREAM).write_text(json.dumps(place), encoding="utf-8")

    def save_whole(self, final: Path) -> None:
        """Save the student aside, committed, and put it in the place of ``final``."""
        staged = final.with_name(staged_name(final.name))
        self.save_model(str(staged))
        if self.args.should_save:
            commit_folder(staged)
            replace_folder(staged, final)

    def save_checkpoint(self) -> None:
        """Save this step, unless it is saved. Of several ranks, one alone may be interrupted."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.world_size == 1 and folder_fault(folder) is not None:
            self._save_checkpoint(self.model, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load student and projectors."""
        load_weights(
            self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint)
        )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
