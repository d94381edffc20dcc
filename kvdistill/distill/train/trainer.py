"""``transformers.Trainer`` for a ``Distiller``: everything that Trainer does well stays Trainer's.

What is added: batches come from a ``KVStream``; losses are divided by token counts summed over
accumulation steps and ranks; every part of the loss is logged; projectors get their own learning
rate; checkpoints hold an ordinary Hugging Face student, the projectors beside it, and the place
in the stream.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
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
from kvdistill.distill.data.stream import KVStream, epochs_for, steps_in, steps_left
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.evaluate.held_out import HeldOut, score_held_out, score_latent
from kvdistill.distill.losses.absorption import (
    AbsorptionMonitor,
    explained_variance,
    gradient_share,
)
from kvdistill.distill.losses.weighting import annealed_scale
from kvdistill.distill.train.callbacks import HumanLog
from kvdistill.distill.train.checkpoint import STUDENT_PREFIX, gathered, load_weights, save_weights
from kvdistill.distill.train.guards import Best, StepGuard, StopOnSignal, best_of
from kvdistill.types import KINDS

log = logging.getLogger(__name__)


STREAM: Final = "stream.json"


GUARD: Final = "recent_losses.json"


BEST: Final = "best"
"""Folder of the best student so far, beside the checkpoints."""


class KVDistillTrainer(Trainer):  # type: ignore[misc]
    """Trains a ``Distiller`` on a ``KVStream``; evaluates by perplexity and bits per character."""

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
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0
        self._figures: dict[str, float] = {}
        self._monitor = AbsorptionMonitor()
        self._figured = -1
        self._steps_before = 0
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.evaluated_samples: list[dict[str, Any]] = []
        self.evaluated_calibration: list[dict[str, float]] = []
        self.guard = StepGuard(experiment.name, experiment.training.spike_factor)
        # Which layers a sharding plugin wraps is the student's to say.
        whole: Any = distiller
        whole._no_split_modules = getattr(whole.student, "_no_split_modules", None)
        super().__init__(
            model=distiller,
            args=arguments,
            train_dataset=stream,
            eval_dataset=list(evaluation),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.remove_callback(PrinterCallback)  # JsonLines and ProgressBar say it better
        disable_progress_bar()  # one bar per saved checkpoint says nothing
        # compute_loss divides by the token counts of the whole step, not of one micro-batch.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The stream as it is: it already yields this rank's whole batches."""
        return DataLoader(self.stream, batch_size=None, num_workers=0)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, Tensor]]:
        """Micro-batches of one step, and the token counts of the step over all ranks."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        distiller: Any = self.accelerator.unwrap_model(self.model)
        found = [distiller.count(batch) for batch in batches]
        if not found:
            return batches, {}
        rows = [torch.stack(list(counts.values())) for counts in found]
        counts = self.accelerator.reduce(torch.stack(rows).sum(0).float().to(device), "sum")
        return batches, dict(zip(found[0], counts, strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted loss of one micro-batch as its share of the step's."""
        figures = self._wants_figures()
        if self.model.training and self.stream.collate.teachers:
            distiller: Any = self.accelerator.unwrap_model(self.model)
            warm = self.state.global_step >= self.experiment.fusion.warmup_steps
            distiller.weigh.routing = warm
            distiller.kv_scale = annealed_scale(
                self.state.global_step, self.state.max_steps, self.experiment.losses.anneal_by
            )
        output = model(inputs, num_items_in_batch, figures=figures)
        for name, value in {"loss": output["loss"], **output["parts"]}.items():
            self._parts[name] = self._parts.get(name, 0) + value.detach()
        if self.model.training:
            parts = {"loss": output["loss"], **output["parts"]}
            self.guard.note(inputs.get("sample_ids", ()), parts)
        if figures:
            self._figures = self._read_figures(output)
        # Data parallelism averages gradients over ranks; the counts are already global.
        loss = output["loss"] * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every part of the loss, as its mean per step since the last log."""
        if "loss" in logs and self._parts:
            steps = max(self.state.global_step - self._parts_since, 1)
            for name, value in self._parts.items():
                total = self.accelerator.reduce(value, "sum")
                logs[_logged_name(name)] = float(total) / steps
            self._parts, self._parts_since = {}, self.state.global_step
            logs |= self._figures
            self._figures = {}
        super().log(logs, start_time)

    def give_up(self, reason: str) -> None:
        """Training failed: say so in the log, and let callbacks release what they hold."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HumanLog):
                callback.write(reason)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _wants_figures(self) -> bool:
        """Once per ``diagnostic_steps`` steps, on the micro-batch that starts the step."""
        step, every = self.state.global_step, self.experiment.training.diagnostic_steps
        fresh = step != self._figured
        if not (self.model.training and fresh and step % every == 0):
            return False
        self._figured = step
        return True

    def _read_figures(self, output: dict[str, Any]) -> dict[str, float]:
        """Fusion weights, target variance, explained variance and gradient share, for the log."""
        if not output["figures"]:
            return {}
        distiller: Any = self.accelerator.unwrap_model(self.model)
        found = {
            f"weight_{teacher.name}": float(weight)
            for teacher, weight in zip(distiller.teachers, output["figures"]["alpha"], strict=True)
        }
        figures = dict(output["figures"])
        figures.pop("alpha")
        watched = {"target_variance": float(figures.pop("target_variance"))}
        found |= {name: float(value) for name, value in figures.items()}
        if output["kv"].requires_grad and distiller.kv_scale and not self.is_fsdp_enabled:
            student = [p for p in distiller.student.parameters() if p.requires_grad]
            # At full weight: a share that fades with its loss is no sign of absorption.
            watched["gradient_share"] = gradient_share(
                output["kv"] / distiller.kv_scale, output["loss"] - output["kv"], student
            )
        for warning in self._monitor.update(**watched):
            log.warning(warning)
        errors = [output["parts"][kind] for kind in KINDS if kind in output["parts"]]
        losses = self.experiment.losses
        if errors and losses.distance == "mse" and not losses.layer_std:
            error = torch.stack(errors).mean().detach()
            found["explained_variance"] = explained_variance(error, watched["target_variance"])
        return found | watched

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last word before the optimizer steps: a step that is no number ends the run."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        spike = self.guard.check(
            self.state.global_step + 1,
            # fp16 has infinite gradients now and then; its scaler leaves these steps out itself.
            # A sharded model's norm is a DTensor, which is not the number until it is gathered.
            None if self.args.fp16 else float(getattr(norm, "full_tensor", lambda: norm)()),
            lambda loss: self.accelerator.reduce(loss, "sum"),
        )
        if spike and self.experiment.training.skip_spikes:
            log.warning("step %d is left out", self.state.global_step + 1)
            model.zero_grad(set_to_none=True)
        return norm

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Perplexity and its like of the student on the held-out texts, and exact match.

        Asked twice at the same step, it answers from memory. ``evaluated_samples`` keeps the
        last evaluation sample by sample.
        """
        step, named = self._evaluated
        if step == self.state.global_step:
            return named
        distiller: Any = self.accelerator.unwrap_model(self.model)
        with gathered(distiller):
            found = self.score(distiller.student)
        self.evaluated_samples, self.evaluated_calibration = found.rows, found.calibration
        named = {f"{metric_key_prefix}_{key}": value for key, value in found.metrics.items()}
        self._evaluated = (self.state.global_step, named)
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        self._keep_or_stop()
        return named

    def _keep_or_stop(self) -> None:
        """Save what was just found to be the best student; end where patience does."""
        training, best = self.experiment.training, self.best
        if best is None:
            return
        if training.keep_best and best.step == self.state.global_step:
            self.save_model(str(Path(self.args.output_dir) / BEST))
        patience = training.early_stop_patience
        if patience is not None and best.since >= patience:
            self.control.should_training_stop = True
            log.warning(
                "%s: no better %s in %d evaluations since step %d; training ends at step %d",
                self.experiment.name, training.best_metric, best.since, best.step,
                self.state.global_step,
            )  # fmt: skip

    @property
    def best(self) -> Best | None:
        """The best evaluation so far, where they are compared."""
        training = self.experiment.training
        if not training.chooses_best:
            return None
        return best_of(self.state.log_history, training.best_metric)

    def take_best(self) -> dict[str, float]:
        """Make the best student that was kept the present one, and evaluate it."""
        distiller: Any = self.accelerator.unwrap_model(self.model)
        load_weights(distiller, Path(self.args.output_dir) / BEST)
        with gathered(distiller):
            found = self.score(distiller.student)
        self.evaluated_samples, self.evaluated_calibration = found.rows, found.calibration
        return {f"eval_{key}": value for key, value in found.metrics.items()}

    def score(self, student: Any) -> HeldOut:
        """What is asked about the held-out samples."""
        training = self.experiment.training
        return score_held_out(
            student,
            self.processing_class,
            self.evaluation,
            max_length=training.max_length,
            batch_size=training.batch_size,
            answer=training.exact_match_samples,
            max_new_tokens=training.max_new_tokens,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with weight decay on matrices alone, and the projectors' own learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model,
                decaying=set(self.get_decay_parameter_names(model)),
                weight_decay=self.args.weight_decay,
                student_rate=self.args.learning_rate,
                other_rate=self.experiment.projection.learning_rate or self.args.learning_rate,
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """The student as a Hugging Face folder; projectors and the stream's place beside it."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        distiller: Any = self.accelerator.unwrap_model(self.model)
        save_weights(distiller, self.processing_class, folder, state_dict)
        (folder / GUARD).write_text(json.dumps(self.guard.state_dict()), encoding="utf-8")
        (folder / STREAM).write_text(json.dumps(self.stream.state_dict()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore the student, the projectors and the stream's place."""
        folder = Path(resume_from_checkpoint)
        distiller: Any = self.accelerator.unwrap_model(model or self.model)
        load_weights(distiller, folder)
        if (folder / GUARD).is_file():
            self.guard.load_state_dict(json.loads((folder / GUARD).read_text(encoding="utf-8")))
        place, state = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in (STREAM, TRAINER_STATE_NAME)
        )
        accumulation = self.args.gradient_accumulation_steps
        self.stream.load_state_dict(place, batches_per_step=accumulation)
        self._steps_before = state["global_step"]

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Numbers of epochs and steps, counted epoch by epoch from where the stream is."""
        _, *per_epoch, max_steps = super().set_initial_training_values(args, dataloader)
        accumulation, before = args.gradient_accumulation_steps, self._steps_before
        if args.max_steps <= 0:
            max_steps = before + steps_left(self.stream, args.num_train_epochs, accumulation)
        epochs = epochs_for(self.stream, max_steps - before, accumulation)
        return epochs, *per_epoch, max_steps

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        """One epoch, of its own number of batches: length buckets do not cut all epochs alike."""
        batches = self.stream.num_batches(epoch)
        steps = steps_in(self.stream, epoch, self.args.gradient_accumulation_steps)
        own = {"steps_in_epoch": batches, "num_update_steps_per_epoch": steps}
        len(kwargs["train_dataloader"])  # it warns of more batches than it said when last asked
        super()._run_epoch(epoch=epoch, **kwargs | own)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Where to go on: the stream knows, on whatever number of ranks it is restored."""
        epochs, batches = super()._init_training_state(*args, **kwargs)
        self._parts, self._parts_since = {}, self.state.global_step
        if self.state.global_step == 0:
            return epochs, batches
        return self.stream.epoch, self.stream.batches_done


def parameter_groups(
    model: nn.Module,
    *,
    decaying: Collection[str],
    weight_decay: float,
    student_rate: float,
    other_rate: float,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, of parameters that learn.

    Args:
        model: a distiller, or a wrapper that keeps its names.
        decaying: names of parameters that decay.
        weight_decay: of those.
        student_rate: learning rate of the student.
        other_rate: learning rate of projectors, routers and gates.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = student_rate if name.startswith(STUDENT_PREFIX) else other_rate
            key = (weight_decay if name in decaying else 0.0, rate)
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "weight_decay": d, "lr": lr} for (d, lr), p in groups.items()]


def _logged_name(part: str) -> str:
    return part if part == "loss" else f"loss_{part}"


class LatentTrainer(KVDistillTrainer):
    """Trains a ``LatentDistiller``; evaluates by exact match.

    Perplexity is left out: a latent student has no text of a rationale to be surprised by.
    """

    def score(self, student: Any) -> HeldOut:
        """Exact match on ``training.exact_match_samples`` held-out samples, or on all of them."""
        training = self.experiment.training
        return score_latent(
            student,
            self.processing_class,
            self.evaluation,
            batch_size=training.batch_size,
            answer=training.exact_match_samples or None,
        )


# MERGED-DOC distill.latent.trainer
# The trainer of a latent student: the same one, but held-out samples are answered, not scored.
