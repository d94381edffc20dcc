"""Putting a run together: tokenizer, student, teachers' spaces, stream and distiller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvdistill.config import Experiment
from kvdistill.corpus import Sample
from kvdistill.distill.alignment import LayerMap, layer_map
from kvdistill.distill.data.collate import Collate
from kvdistill.distill.data.stream import KVStream, Rank, StoreSource
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.pilot import cka_map, pilot, start_projectors
from kvdistill.distill.spaces import teacher_space
from kvdistill.distill.student import build_student, student_geometry
from kvdistill.distill.tokenizer import load_tokenizer
from kvdistill.errors import ConfigError
from kvdistill.store.reader import KVStore


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
) -> Assembled:
    """Build a run from its config and its store.

    Args:
        experiment: the run.
        store: complete for all its teachers.
        samples: the training texts, of which the task tags are taken.
        rank: this process among those that train together.
        resuming: a checkpoint will overwrite all weights, so closed-form ones are not computed.

    Raises:
        StudentError, StoreError, ConfigError: see the parts.
    """
    config, training = experiment.student, experiment.training
    tokenizer = load_tokenizer(config.tokenizer or str(config.model), config.trust_remote_code)
    student = build_student(config, tokenizer, experiment.seed)
    tasks = sorted({sample.task for sample in samples if sample.task is not None})
    task_ids = {task: number for number, task in enumerate(tasks, start=1)}
    alone = Collate(
        tokenizer, training.max_length, experiment.alignment, experiment.losses, [], task_ids
    )
    names = experiment.teachers if experiment.losses.uses_teachers else ()
    maps = {name: _layers(experiment, student, store, name, alone) for name in names}
    teachers = [teacher_space(store, name, maps[name], experiment.fusion) for name in maps]
    collate = replace(alone, teachers=teachers)
    source = StoreSource(store, {space.name: space.needed for space in teachers})
    distiller = Distiller(
        student,
        teachers,
        alignment=experiment.alignment,
        projection=experiment.projection,
        fusion=experiment.fusion,
        losses=experiment.losses,
        num_tasks=len(tasks),
    )
    if not resuming:
        _start(distiller, source, collate, experiment)
    stream = KVStream(
        source,
        collate,
        batch_size=training.batch_size,
        seed=experiment.seed,
        window_shards=training.window_shards,
        read_ahead=training.read_ahead,
        rank=rank,
    )
    return Assembled(distiller, stream, tokenizer)


def _start(
    distiller: Distiller, source: StoreSource, collate: Collate, experiment: Experiment
) -> None:
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
    return layer_map(alignment.layers, num_layers, layers, explicit=explicit)
