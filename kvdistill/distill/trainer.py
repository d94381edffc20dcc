"""``transformers.Trainer`` for a ``Distiller``: everything that Trainer does well stays Trainer's.

What is added: batches come from a ``KVStream``; losses are divided by token counts summed over
accumulation steps and ranks; every part of the loss is logged; projectors get their own learning
rate; checkpoints hold an ordinary Hugging Face student, the projectors beside it, and the place
in the stream.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from kvdistill.config import Experiment
from kvdistill.corpus import Sample
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.data.stream import KVStream
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.held_out import HeldOut, score_held_out
from kvdistill.distill.interruption import StopOnSignal
from kvdistill.distill.losses import AbsorptionMonitor, explained_variance, gradient_share
from kvdistill.errors import NonFiniteError
from kvdistill.types import KINDS

log = logging.getLogger(__name__)

PROJECTORS: Final = "projectors.safetensors"
STREAM: Final = "stream.json"
STUDENT_PREFIX: Final = "student."


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
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.evaluated_samples: list[dict[str, Any]] = []
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
        output = model(inputs, num_items_in_batch, figures=figures)
        for name, value in {"loss": output["loss"], **output["parts"]}.items():
            self._parts[name] = self._parts.get(name, 0) + value.detach()
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
            self._refuse_non_finite(logs)
            self._parts, self._parts_since = {}, self.state.global_step
            logs |= self._figures
            self._figures = {}
        super().log(logs, start_time)

    def _wants_figures(self) -> bool:
        """Once per ``figure_steps`` optimizer steps, on the micro-batch that starts the step."""
        step, every = self.state.global_step, self.experiment.training.figure_steps
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
        if output["kv"].requires_grad and not self.is_fsdp_enabled:
            student = list(distiller.student.parameters())
            watched["gradient_share"] = gradient_share(
                output["kv"], output["loss"] - output["kv"], student
            )
        for warning in self._monitor.update(**watched):
            log.warning(warning)
        errors = [output["parts"][kind] for kind in KINDS if kind in output["parts"]]
        losses = self.experiment.losses
        if errors and losses.distance == "mse" and not losses.layer_std:
            error = torch.stack(errors).mean().detach()
            found["explained_variance"] = explained_variance(error, watched["target_variance"])
        return found | watched

    def _refuse_non_finite(self, logs: dict[str, float]) -> None:
        """Stop a run that has gone wrong; its last checkpoint is from before it did, or near it."""
        bad = [name for name in self._parts if not math.isfinite(logs[_logged_name(name)])]
        if bad:
            raise NonFiniteError(
                f"{self.experiment.name}: between steps {self._parts_since + 1} and "
                f"{self.state.global_step}, {', '.join(sorted(bad))} became NaN or infinite; lower "
                "training.learning_rate or training.max_grad_norm, or use bfloat16 or float32, and "
                "go on from the last checkpoint under another name"
            )

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Perplexity and its like of the student on the held-out texts, and exact match.

        Asked twice at the same step, it answers from memory. ``evaluated_samples`` keeps the
        last evaluation sample by sample.
        """
        step, named = self._evaluated
        if step == self.state.global_step:
            return named
        distiller: Any = self.accelerator.unwrap_model(self.model)
        found = self.score(distiller.student)
        self.evaluated_samples = found.rows
        named = {f"{metric_key_prefix}_{key}": value for key, value in found.metrics.items()}
        self._evaluated = (self.state.global_step, named)
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

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
            decay = set(self.get_decay_parameter_names(model))
            rate = self.experiment.projection.learning_rate or self.args.learning_rate
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    student = name.startswith(STUDENT_PREFIX)
                    key = (
                        self.args.weight_decay if name in decay else 0.0,
                        self.args.learning_rate if student else rate,
                    )
                    groups.setdefault(key, []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(
                [{"params": p, "weight_decay": d, "lr": lr} for (d, lr), p in groups.items()],
                **options,
            )
        return self.optimizer

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """The student as a Hugging Face folder; projectors and the stream's place beside it."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        distiller: Any = self.accelerator.unwrap_model(self.model)
        state = state_dict or distiller.state_dict()
        student, projectors = {}, {}
        for name, value in state.items():
            if name.startswith(STUDENT_PREFIX):
                student[name.removeprefix(STUDENT_PREFIX)] = value
            else:
                projectors[name] = value.contiguous()
        distiller.student.save_pretrained(folder, state_dict=student)
        self.processing_class.save_pretrained(folder)
        if projectors:
            save_file(projectors, folder / PROJECTORS)
        (folder / STREAM).write_text(json.dumps(self.stream.state_dict()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore the student, the projectors and the stream's place."""
        folder = Path(resume_from_checkpoint)
        distiller: Any = self.accelerator.unwrap_model(model or self.model)
        saved = type(distiller.student).from_pretrained(folder, dtype=torch.float32)
        distiller.student.load_state_dict(saved.state_dict())
        if (folder / PROJECTORS).is_file():
            distiller.load_state_dict(load_file(folder / PROJECTORS), strict=False)
        self.stream.load_state_dict(json.loads((folder / STREAM).read_text(encoding="utf-8")))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Where to go on: the stream knows, on whatever number of ranks it is restored."""
        epochs, batches = super()._init_training_state(*args, **kwargs)
        self._parts, self._parts_since = {}, self.state.global_step
        if self.state.global_step == 0:
            return epochs, batches
        return self.stream.epoch, self.stream.batches_done


def _logged_name(part: str) -> str:
    return part if part == "loss" else f"loss_{part}"
