"""Set-up of a run: from its config and its store to a distiller that is ready to train.

``assemble`` builds tokenizer, student, teacher spaces, stream and distiller. Two settings need
measurements on a few pilot batches first: the layer map by CKA, and closed-form projectors.
``training_arguments`` translates the config's ``training`` section for transformers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.kv_capture import KVCapture, verify_student
from kvdistill.config.distill import FusionConfig, ProjectionConfig
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample
from kvdistill.distill.align.band import band_of
from kvdistill.distill.align.layers import LayerMap, layer_map, linear_cka, monotone_map
from kvdistill.distill.data.collate import Batch, Collate
from kvdistill.distill.data.placebo import with_placebo
from kvdistill.distill.data.stream import KVStream, Rank, Source, StoreSource, open_stream
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.project.closed_form import PilotMoments, initialise
from kvdistill.distill.student.build import build_student, load_student_tokenizer
from kvdistill.distill.student.latent.latent_distiller import LatentDistiller, nearest_layers
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.distill.student.latent.questions import LatentCollate
from kvdistill.distill.targets import TeacherHead, TeacherSpace, check_alignment, teacher_space
from kvdistill.distill.train.callbacks import RunTensorBoard, RunWandb
from kvdistill.distill.train.devices import OneDeviceArguments
from kvdistill.errors import ConfigError
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS, Kind

SourceOf = Callable[[KVStore, Mapping[str, Sequence[int]]], Source]
"""Makes a source of shards from a store and the layers needed of each teacher."""


@dataclass(frozen=True, eq=False)
class Assembled:
    """What the trainer is built from."""

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
    """Build a run from its config and its store, which is complete for all teachers of the run.

    Args:
        experiment: the run.
        store: read for geometry and statistics; ``source_of`` makes the source of its shards.
        samples: the training samples; the task ids are taken from them.
        rank: this process among those that train together.
        resuming: skip closed-form projectors, since a checkpoint will overwrite all weights.
        source_of: where shards come from.

    Raises:
        StudentError, StoreError, ConfigError: see the parts.
    """
    config, training = experiment.student, experiment.training
    tokenizer = load_student_tokenizer(
        config.tokenizer or str(config.model), config.trust_remote_code
    )
    student = build_student(config, tokenizer, experiment.seed)
    verify_student(student)
    tasks = sorted({sample.task for sample in samples if sample.task is not None})
    task_ids = {task: number for number, task in enumerate(tasks, start=1)}
    settings = (tokenizer, training.max_length, experiment.alignment, experiment.losses)
    collate = (
        Collate(*settings, (), task_ids)
        if experiment.latent is None
        else LatentCollate(*settings, (), task_ids, experiment.latent)
    )
    names = experiment.teachers if experiment.losses.uses_teachers else ()
    for name in names:
        check_alignment(store.teacher(name), experiment.alignment.time)
    maps = {name: _layer_map_of(experiment, student, store, name, collate) for name in names}
    fusion = experiment.fusion, experiment.extraction.prototypes
    teachers = [teacher_space(store, name, maps[name], *fusion) for name in maps]
    collate = replace(collate, teachers=teachers)
    layers = {space.name: space.needed for space in teachers}
    source = with_placebo(source_of(store, layers), store, layers, experiment.placebo)
    distiller = _distiller(experiment, student, teachers, store, len(tasks))
    init = experiment.projection.first_weights
    if not resuming and init in ("pca", "ridge") and teachers and distiller.projects:
        batches = _pilot_batches(source, collate, training.batch_size)
        pilot = islice(batches, experiment.projection.pilot_batches)
        initialise_projectors(distiller, pilot, init)
    stream = open_stream(source, collate, samples, training, seed=experiment.seed, rank=rank)
    return Assembled(distiller, stream, tokenizer)


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
        latent_student = LatentStudent(student, experiment.latent)
    manifests = {space.name: store.teacher(space.name) for space in teachers}
    return LatentDistiller(latent_student, teachers, manifests, **settings)


def _layer_map_of(
    experiment: Experiment, student: Any, store: KVStore, name: str, collate: Collate
) -> LayerMap:
    alignment = experiment.alignment
    if alignment.layers == "cka":
        return cka_map(student, store, name, collate, experiment.projection.pilot_batches)
    explicit = (alignment.explicit_layers or {}).get(name)
    if alignment.layers == "explicit" and explicit is None:
        raise ConfigError(
            f"alignment.explicit_layers: expected layers for teacher {name!r}, got teachers "
            f"{sorted(alignment.explicit_layers or ())}; add the missing one"
        )
    layers = store.teacher(name).layers
    num_layers = KVCapture(student).geometry.num_layers
    mapping = layer_map(alignment.layers, num_layers, layers, explicit=explicit)
    return mapping if experiment.latent is None else nearest_layers(mapping)


def _pilot_batches(source: Source, collate: Collate, batch_size: int) -> Iterator[Batch]:
    """The corpus's batches, in the order of the shards."""
    for shard_idx in range(len(source.sizes)):
        shard = source.load(shard_idx)
        for start in range(0, len(shard.samples), batch_size):
            chosen = range(len(shard.samples))[start : start + batch_size]
            yield collate([shard.item(i) for i in chosen])


@torch.no_grad()
def initialise_projectors(distiller: Distiller, batches: Iterable[Batch], init: Any) -> None:
    """Initialise every teacher-to-student projection in closed form, from pilot batches.

    ``init`` is ``pca`` or ``ridge``.

    Raises:
        ConfigError: no token of the pilot batches is covered by a teacher.
    """
    shapes = distiller.capture.geometry.shapes
    heads = [distiller.head(t.name, kind) for t in distiller.teachers for kind in KINDS]
    moments = {
        (head, i): PilotMoments(
            len(group.student_layers), group.shapes[head.kind].width, shapes[head.kind].width
        )
        for head in heads
        for i, group in enumerate(head.groups)
    }
    device = next(distiller.parameters()).device
    for batch in batches:
        moved = send_to_device(batch, device)
        view = distiller.run_student(moved)
        targets = distiller.targets(moved["teachers"])
        for kind in KINDS:
            rows = zip(distiller.teachers, distiller.heads_of(kind), targets[kind], strict=True)
            for teacher, head, groups in rows:
                mask = moved["teachers"][teacher.name]["covered"]
                for i, target in enumerate(groups):
                    moments[head, i].add(target, head.of_group(view.kind(kind), i), mask)
    for (head, i), found in moments.items():
        projection: Any = head.project[i]
        initialise(projection, found, init)


@torch.no_grad()
def cka_map(
    student: Any, store: KVStore, name: str, collate: Collate, num_batches: int
) -> LayerMap:
    """Monotone layer map of largest total similarity, by linear CKA of keys and values.

    ``collate`` is the run's, with any teachers; ``num_batches`` of 8 samples are measured on.
    """
    layers = store.teacher(name).layers
    identity = LayerMap(layers, layers, (0.0,) * len(layers))
    space = teacher_space(store, name, identity, FusionConfig())
    collate = replace(collate, teachers=[space])
    capture = KVCapture(student)
    device = next(student.parameters()).device
    unused = ProjectionConfig(mode="joint")
    heads = {
        kind: TeacherHead(space, kind, HeadShape(1, 1), unused, projects=False) for kind in KINDS
    }
    student_parts: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
    teacher_parts: dict[Kind, list[list[Tensor]]] = {kind: [] for kind in KINDS}
    batches = _pilot_batches(StoreSource(store, {name: layers}), collate, batch_size=8)
    for batch in islice(batches, num_batches):
        moved = send_to_device(batch, device)
        teacher = moved["teachers"][name]
        mask_BT = teacher["covered"]
        with capture() as captured:
            student(moved["input_ids"], attention_mask=moved["attention_mask"], use_cache=False)
        for kind in KINDS:
            layers_kv = [getattr(layer, kind) for layer in captured]
            student_parts[kind].append(_masked_tokens(torch.stack(layers_kv, 1), mask_BT))
            groups = heads[kind].to(device).layers(teacher[kind], band_of(teacher))
            targets = [group.stacked() for group in groups]
            teacher_parts[kind].append([_masked_tokens(x, mask_BT) for x in targets])
    order = [layer for group in space.groups for layer in group.layer_map.lower]
    similarity = sum(_similarity(student_parts[kind], teacher_parts[kind]) for kind in KINDS)
    columns = torch.tensor([order.index(layer) for layer in layers])
    return monotone_map(torch.as_tensor(similarity).cpu()[:, columns], layers)


def _masked_tokens(x_BLHTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The masked-in tokens of every layer, ``[L, N, H·D]``."""
    return x_BLHTD.permute(0, 3, 1, 2, 4).flatten(3)[mask_BT].transpose(0, 1)


def _similarity(student_parts: list[Tensor], teacher_parts: list[list[Tensor]]) -> Tensor:
    """CKA ``[L_s, L_t]`` of tokens collected batch by batch; teacher layers group by group."""
    student = torch.cat(student_parts, dim=1)
    groups = [torch.cat(parts, dim=1) for parts in zip(*teacher_parts, strict=True)]
    return torch.cat([linear_cka(student, group) for group in groups], dim=1)


def training_arguments(experiment: Experiment, folder: Path, evaluates: bool) -> OneDeviceArguments:
    """Translate the config's ``training`` section.

    ``folder`` is the run's; ``evaluates`` is False where there are no held-out samples.
    """
    training = experiment.training
    evaluate = evaluates and training.eval_steps is not None
    arguments = OneDeviceArguments(
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
        # Without it, processes on a machine without accelerators would each train alone.
        use_cpu=training.device == "cpu" or not torch.accelerator.is_available(),
        report_to=[],  # their callbacks belong to the run: `log_callbacks`
        run_name=experiment.name,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    arguments.warn_of_idle_devices(experiment.name)
    return arguments


def log_callbacks(folder: Path) -> list[Any]:
    """TensorBoard; Weights & Biases too where it is installed and its environment enables it."""
    enabled = any(os.environ.get(name) for name in ("WANDB_PROJECT", "WANDB_API_KEY"))
    disabled = os.environ.get("WANDB_MODE") == "disabled"
    if enabled and not disabled and importlib.util.find_spec("wandb") is not None:
        return [RunTensorBoard(folder), RunWandb()]
    return [RunTensorBoard(folder)]
