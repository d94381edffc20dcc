"""Putting a run together: tokenizer, student, teachers' spaces, stream and distiller."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from kvdistill.attention.geometry import student_geometry
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample
from kvdistill.distill.align.layers import LayerMap, layer_map
from kvdistill.distill.data.collate import Collate
from kvdistill.distill.data.placebo import with_placebo
from kvdistill.distill.data.source import Source, StoreSource
from kvdistill.distill.data.stream import KVStream, Rank, open_stream
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.student.latent.latent_distiller import LatentDistiller, nearest_layers
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.distill.student.latent.questions import LatentCollate
from kvdistill.distill.student.build import build_student
from kvdistill.distill.student.build import load_student_tokenizer
from kvdistill.distill.targets import TeacherSpace, check_alignment, teacher_space
from kvdistill.distill.train.checkpoint import STUDENT_PREFIX
from kvdistill.distill.train.pilot import cka_map, pilot, start_projectors
from kvdistill.errors import ConfigError
from kvdistill.store.reader import KVStore

SourceOf = Callable[[KVStore, Mapping[str, Sequence[int]]], Source]


@dataclass(frozen=True, eq=False)
class Assembled:
    """Everything that the trainer is given."""

    distiller: Distiller
    stream: KVStream
    tokenizer: Any


def assemble(
    experiment: Experiment,
    store: KVStore,
    samples: Sequence[Sample],
    rank: Rank,
    *,
    resuming: bool = False,
    source_of: SourceOf = StoreSource,
) -> Assembled:
    """Build a run from its config and its store.

    Args:
        experiment: the run.
        store: complete for all its teachers.
        samples: the training texts, of which the task tags are taken.
        rank: this process among those that train together.
        resuming: a checkpoint will overwrite all weights, so closed-form ones are not computed.
        source_of: what the shards come from, given the store and each teacher's needed layers.

    Raises:
        StudentError, StoreError, ConfigError: see the parts.
    """
    config, training = experiment.student, experiment.training
    tokenizer = load_student_tokenizer(
        config.tokenizer or str(config.model), config.trust_remote_code
    )
    student = build_student(config, tokenizer, experiment.seed)
    tasks = sorted({sample.task for sample in samples if sample.task is not None})
    task_ids = {task: number for number, task in enumerate(tasks, start=1)}
    alone = _collate(experiment, tokenizer, task_ids)
    names = experiment.teachers if experiment.losses.uses_teachers else ()
    for name in names:
        check_alignment(store.teacher(name), experiment.alignment.time)
    maps = {name: _layer_map_of(experiment, student, store, name, alone) for name in names}
    teachers = [teacher_space(store, name, maps[name], experiment.fusion) for name in maps]
    collate = replace(alone, teachers=teachers)
    layers = {space.name: space.needed for space in teachers}
    source = with_placebo(source_of(store, layers), store, layers, experiment.placebo)
    distiller = _distiller(experiment, student, teachers, store, len(tasks))
    if not resuming:
        _initialise_projections(distiller, source, collate, experiment)
    stream = open_stream(source, collate, samples, training, seed=experiment.seed, rank=rank)
    return Assembled(distiller, stream, tokenizer)


def _collate(experiment: Experiment, tokenizer: Any, task_ids: dict[str, int]) -> Collate:
    """Makes batches, as yet without teachers."""
    max_length, losses = experiment.training.max_length, experiment.losses
    shared = (tokenizer, max_length, experiment.alignment, losses, (), task_ids)
    if experiment.latent is None:
        return Collate(*shared)
    return LatentCollate(*shared, experiment.latent)


def _distiller(
    experiment: Experiment,
    student: Any,
    teachers: list[TeacherSpace],
    store: KVStore,
    num_tasks: int,
) -> Distiller:
    settings: dict[str, Any] = {
        "alignment": experiment.alignment,
        "projection": experiment.projection,
        "fusion": experiment.fusion,
        "losses": experiment.losses,
        "num_tasks": num_tasks,
    }
    if experiment.latent is None:
        return Distiller(student, teachers, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        thinking = LatentStudent(student, experiment.latent)
    manifests = {space.name: store.teacher(space.name) for space in teachers}
    return LatentDistiller(thinking, teachers, manifests, **settings)


def _initialise_projections(
    distiller: Distiller, source: Source, collate: Collate, experiment: Experiment
) -> None:
    """Closed-form first weights, where the config asks for them and something projects."""
    projection = experiment.projection
    if projection.first_weights in ("pca", "ridge") and distiller.teachers and distiller.projects:
        size, count = experiment.training.batch_size, projection.pilot_batches
        start_projectors(distiller, pilot(source, collate, size, count), projection.first_weights)


def _layer_map_of(
    experiment: Experiment, student: Any, store: KVStore, name: str, collate: Collate
) -> LayerMap:
    alignment = experiment.alignment
    if alignment.layers == "cka":
        return cka_map(student, store, name, collate, experiment.projection.pilot_batches)
    explicit = None
    if alignment.explicit_layers is not None:
        if name not in alignment.explicit_layers:
            raise ConfigError(f"alignment.explicit_layers has no layers for teacher {name!r}")
        explicit = alignment.explicit_layers[name]
    layers = store.teacher(name).layers
    num_layers = student_geometry(student).num_layers
    mapping = layer_map(alignment.layers, num_layers, layers, explicit=explicit)
    return mapping if experiment.latent is None else nearest_layers(mapping)


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


# MERGED-DOC distill.training_arguments
# The config's ``training`` section as transformers' ``TrainingArguments``.


# MERGED-DOC distill.parameter_groups
# Parameters by weight decay and learning rate: matrices decay, projectors have their own rate.
