"""The config's ``training`` section as transformers' ``TrainingArguments``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from transformers import TrainingArguments

from kvdistill.config import Experiment


def training_arguments(experiment: Experiment, folder: Path, evaluates: bool) -> TrainingArguments:
    """Arguments of a run in ``folder``; ``evaluates`` says whether there is held-out text."""
    training = experiment.training
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    evaluate = evaluates and training.eval_steps is not None
    return TrainingArguments(
        output_dir=str(folder),
        seed=experiment.seed,
        data_seed=experiment.seed,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=training.eval_steps if evaluate else None,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 500,
        save_total_limit=training.keep_checkpoints,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        use_cpu=training.device == "cpu",
        report_to=_reports(),
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def _reports() -> list[str]:
    """TensorBoard; Weights & Biases where it is installed and its environment asks for it."""
    asked = any(os.environ.get(name) for name in ("WANDB_PROJECT", "WANDB_API_KEY"))
    off = os.environ.get("WANDB_MODE") == "disabled"
    if asked and not off and importlib.util.find_spec("wandb") is not None:
        return ["tensorboard", "wandb"]
    return ["tensorboard"]
