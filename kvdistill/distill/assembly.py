"""Putting a run together: tokenizer, student, teachers' spaces, stream and distiller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvdistill.config import Experiment
from kvdistill.corpus import Sample
from kvdistill.distill.alignment import LayerMap, layer_map
from kvdistill.distill.data.collate import Collate
from kvdistill.distill.data.placebo import with_placebo
from kvdistill.distill.data.reading import open_stream
from kvdistill.distill.data.source import Source, StoreSource
from kvdistill.distill.data.stream import KVStream, Rank
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.latent.collate import LatentCollate
from kvdistill.distill.latent.distiller import LatentDistiller
from kvdistill.distill.latent.student import LatentStudent
from kvdistill.distill.latent.targets import nearest_layers
from kvdistill.distill.pilot import cka_map, pilot, start_projectors
from kvdistill.distill.spaces import TeacherSpace, check_alignment, teacher_space
from kvdistill.distill.student import build_student, student_geometry
from kvdistill.distill.tokenizer import load_tokenizer
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
    tokenizer = load_tokenizer(config.tokenizer or str(config.model), config.trust_remote_code)
    student = build_student(config, tokenizer, experiment.seed)
    tasks = sorted({sample.task for sample in samples if sample.task is not None})
    task_ids = {task: number for number, task in enumerate(tasks, start=1)}
    alone = _collate(experiment, tokenizer, task_ids)
    names = experiment.teachers if experiment.losses.uses_teachers else ()
    for name in names:
        check_alignment(store.teacher(name), experiment.alignment.time)
    maps = {name: _layers(experiment, student, store, name, alone) for name in names}
    teachers = [teacher_space(store, name, maps[name], experiment.fusion) for name in maps]
    collate = replace(alone, teachers=teachers)
    layers = {space.name: space.needed for space in teachers}
    source = with_placebo(source_of(store, layers), store, layers, experiment.placebo)
    distiller = _distiller(experiment, student, teachers, store, len(tasks))
    if not resuming:
        _start(distiller, source, collate, experiment)
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


def _start(distiller: Distiller, source: Source, collate: Collate, experiment: Experiment) -> None:
    """Closed-form first weights, where the config asks for them and something projects."""
    projection = experiment.projection
    if projection.first_weights in ("pca", "ridge") and distiller.teachers and distiller.projects:
        size, count = experiment.training.batch_size, projection.pilot_batches
        start_projectors(distiller, pilot(source, collate, size, count), projection.first_weights)


def _layers(
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
