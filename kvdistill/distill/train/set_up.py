"""Set-up of a run: from its config and its store to a distiller that is ready to train.

``assemble`` builds tokenizer, student, teacher spaces, stream and distiller. Two settings need
measurements on a few batches first (``pilot.py``): the layer map by CKA, and closed-form maps.
``training_arguments`` translates the config's ``training`` section for transformers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvdistill.attention.geometry import position_limit
from kvdistill.attention.kv_capture import KVCapture, verify_student
from kvdistill.attention.tokens import tokenizer_fingerprint
from kvdistill.config.distill import FusionConfig
from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample
from kvdistill.distill.align.layers import LayerMap, layer_map
from kvdistill.distill.align.vocabulary import vocabulary_between
from kvdistill.distill.data.collate import Collate, require_text
from kvdistill.distill.data.placebo import with_placebo
from kvdistill.distill.data.stream import KVStream, Rank, Source, StoreSource, open_stream
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.evaluate.held_out import prompt_budget
from kvdistill.distill.losses.fused_residual import kernel_fault
from kvdistill.distill.student.build import (
    build_student,
    load_student_tokenizer,
    require_positions,
    tokenizer_of,
)
from kvdistill.distill.student.latent.latent_distiller import LatentDistiller, nearest_layers
from kvdistill.distill.student.latent.model import LatentStudent, question_room
from kvdistill.distill.student.latent.questions import LatentCollate
from kvdistill.distill.targets import TeacherHead, TeacherSpace, check_alignment, teacher_space
from kvdistill.distill.train.callbacks import TRACKERS
from kvdistill.distill.train.devices import OneDeviceArguments, chosen_precision
from kvdistill.distill.train.pilot import (
    Explained,
    cka_map,
    fit_projections,
    measuring,
    pilot_of,
)
from kvdistill.errors import ConfigError, MissingExtra
from kvdistill.store.reader import KVStore

SourceOf = Callable[[KVStore, Mapping[str, Sequence[int]]], Source]
"""Makes a source of shards from a store and the layers needed of each teacher."""


@dataclass(frozen=True, eq=False)
class Assembled:
    """What the trainer is built from."""

    distiller: Distiller
    stream: KVStream
    tokenizer: Any
    explained: Explained
    """What the fitted maps explain before step 1; empty where none were fitted."""
    unfused: str | None
    """Why keys and values are compared without the fused kernel; None where it is used."""


def assemble(
    experiment: Experiment,
    store: KVStore,
    samples: Sequence[Sample],
    rank: Rank,
    *,
    resuming: bool = False,
    source_of: SourceOf | None = None,
    device: torch.device | str = "cpu",
) -> Assembled:
    """Build a run from its config and its store, which is complete for all teachers of the run.

    Args:
        experiment: the run.
        store: read for geometry and statistics; ``source_of`` makes the source of its shards.
        samples: the training samples; the task ids are taken from them.
        rank: this process among those that train together.
        resuming: skip closed-form projectors, since a checkpoint will overwrite all weights.
        source_of: where shards come from; the store if None.
        device: where pilots run; the distiller is returned on the CPU.

    Raises:
        StudentError, StoreError, ConfigError, CorpusError: see the parts.
    """
    config, training = experiment.student, experiment.training
    tokenizer = tokenizer_of(config)
    require_text(tokenizer, samples, training.max_length)
    student = build_student(config, tokenizer, experiment.seed)
    verify_student(student)
    if unknown := sorted({s.teacher for s in samples if s.teacher} - set(store.teachers())):
        raise ConfigError(
            f"corpus: texts name the teacher {unknown[0]!r}, but the store has {store.teachers()}"
        )
    tasks = sorted({sample.task for sample in samples if sample.task is not None})
    task_ids = {task: number for number, task in enumerate(tasks, start=1)}
    settings = (tokenizer, training.max_length, experiment.alignment, experiment.losses)
    collate = (
        Collate(*settings, (), task_ids)
        if experiment.latent is None
        else LatentCollate(*settings, (), task_ids, experiment.latent)
    )
    _check_lengths(experiment, student, collate, samples)
    names = experiment.teachers if experiment.losses.uses_teachers else ()
    for name in names:
        check_alignment(store.teacher(name), experiment.alignment.time)
    maps = {
        name: _layer_map_of(
            experiment, student, store, name, collate=collate, device=torch.device(device)
        )
        for name in names
    }
    fusion, kinds = (experiment.fusion, experiment.extraction.prototypes), experiment.losses.kinds
    teachers = [teacher_space(store, name, maps[name], *fusion, kinds=kinds) for name in maps]
    if experiment.losses.logits:
        teachers = _with_vocabularies(teachers, experiment, store, tokenizer)
    collate = replace(collate, teachers=teachers)
    layers = {space.name: space.needed for space in teachers}
    made = (source_of or partial(StoreSource, kinds=kinds))(store, layers)
    source = with_placebo(made, store, layers, experiment.placebo)
    distiller = _distiller(experiment, student, teachers, store, task_ids)
    explained: Explained = {}
    if not resuming and experiment.fitted is not None:
        with measuring(distiller, torch.device(device)):
            pilot = pilot_of(source, collate, experiment)
            explained = fit_projections(distiller, pilot, experiment.fitted)
    stream = open_stream(source, collate, samples, training, seed=experiment.seed, rank=rank)
    return Assembled(distiller, stream, tokenizer, explained, _fuse(experiment, distiller, device))


def _fuse(experiment: Experiment, distiller: Distiller, device: torch.device | str) -> str | None:
    """Let the heads compare in the fused kernel, or return why they do not."""
    fault = experiment.unfused or kernel_fault(torch.device(device))
    for module in distiller.modules():
        if isinstance(module, TeacherHead):
            module.is_fused = fault is None and module.kind != "hidden"
    return fault


def _with_vocabularies(
    teachers: list[TeacherSpace], experiment: Experiment, store: KVStore, tokenizer: Any
) -> list[TeacherSpace]:
    """The teachers; with their vocabularies where they predicted text.

    Raises:
        ConfigError: none did, one read another text, or its tokenizer is not the one it had.
    """
    found = []
    for space in teachers:
        manifest, config = store.teacher(space.name), experiment.teachers[space.name]
        if manifest.own_text:
            raise ConfigError(
                f"losses.logits: teacher {space.name!r} generated its own rationales, which share "
                "no characters with the corpus; remove it, or set losses.logits to 0"
            )
        vocabulary = None
        if manifest.num_logits:
            own = load_student_tokenizer(config.tokenizer or config.model, config.trust_remote_code)
            if tokenizer_fingerprint(own) != manifest.tokenizer_fingerprint:
                raise ConfigError(
                    f"losses.logits: the tokenizer of teacher {space.name!r} is not the one that "
                    "it was extracted with; restore it"
                )
            shared = vocabulary_between(own, tokenizer)
            vocabulary = replace(shared, num_logits=experiment.extraction.logits)
        found.append(replace(space, vocabulary=vocabulary))
    if not any(space.vocabulary for space in found):
        raise ConfigError("losses.logits: no teacher predicts text; add a decoder, or set it to 0")
    return found


def _check_lengths(
    experiment: Experiment, student: Any, collate: Collate, samples: Sequence[Sample]
) -> None:
    """Refuse texts and answers that the student has too few positions for; raises StudentError."""
    training = experiment.training
    require_positions(student, training.max_length, "training.max_length")
    if isinstance(collate, LatentCollate) and position_limit(student) is not None:
        require_positions(student, collate.longest(samples), "a question, its latents and answer")
        question_room(student, collate.latent, collate.latent.max_new_tokens)
    elif experiment.latent is None and training.exact_match_samples:
        prompt_budget(student, training.max_new_tokens)


def _distiller(
    experiment: Experiment,
    student: Any,
    teachers: list[TeacherSpace],
    store: KVStore,
    tasks: Mapping[str, int],
) -> Distiller:
    settings: dict[str, Any] = {
        "alignment": experiment.alignment,
        "projection": experiment.projection.model_copy(
            update={"init": experiment.first_projection}
        ),
        "fusion": experiment.fusion,
        "losses": experiment.losses,
        "tasks": tasks,
    }
    if experiment.latent is None:
        return Distiller(student, teachers, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        latent_student = LatentStudent(student, experiment.latent)
    manifests = {space.name: store.teacher(space.name) for space in teachers}
    return LatentDistiller(latent_student, teachers, manifests, **settings)


def _layer_map_of(
    experiment: Experiment,
    student: Any,
    store: KVStore,
    name: str,
    *,
    collate: Collate,
    device: torch.device,
) -> LayerMap:
    alignment, layers = experiment.alignment, store.teacher(name).layers
    if alignment.layers == "cka":
        itself = LayerMap(layers, layers, (0.0,) * len(layers))
        space = teacher_space(store, name, itself, FusionConfig(), kinds=collate.losses.kinds)
        source = StoreSource(store, {name: layers}, collate.losses.kinds)
        pilot = pilot_of(source, replace(collate, teachers=[space]), experiment)
        with measuring(student, device):
            return cka_map(student, space, pilot)
    explicit = (alignment.explicit_layers or {}).get(name)
    if alignment.layers == "explicit" and explicit is None:
        raise ConfigError(
            f"alignment.explicit_layers: expected layers for teacher {name!r}, got teachers "
            f"{sorted(alignment.explicit_layers or ())}; add the missing one"
        )
    num_layers = KVCapture(student).geometry.num_layers
    mapping = layer_map(alignment.layers, num_layers, layers, explicit=explicit)
    return mapping if experiment.latent is None else nearest_layers(mapping)


def training_arguments(experiment: Experiment, folder: Path, evaluates: bool) -> OneDeviceArguments:
    """Translate the config's ``training`` section.

    ``folder`` is the run's; ``evaluates`` is False where there are no held-out samples.
    """
    training = experiment.training
    precision = chosen_precision(training)
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
        optim="adamw_torch_fused",
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=training.eval_steps if evaluate else None,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 500,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        # Without it, processes on a machine without accelerators would each train alone.
        use_cpu=training.device == "cpu" or not torch.accelerator.is_available(),
        report_to=[],  # their callbacks belong to the run: `log_callbacks`
        run_name=experiment.name,
        project=os.environ.get("TRACKIO_PROJECT", "kvdistill"),
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    arguments.warn_of_idle_devices(experiment.name)
    return arguments


def trackers(experiment: Experiment) -> tuple[str, ...]:
    """Where the run's curves go; by default W&B too, where its environment enables it.

    Raises:
        MissingExtra: a tracker that ``report_to`` names is not installed.
    """
    there = {name for name in TRACKERS if importlib.util.find_spec(name) is not None}
    for name in experiment.report_to or ():
        if name not in there:
            raise MissingExtra(
                f"report_to: {name} is not installed; pip install {name}, or remove it there"
            )
    enabled = any(os.environ.get(name) for name in ("WANDB_PROJECT", "WANDB_API_KEY"))
    wandb = enabled and os.environ.get("WANDB_MODE") != "disabled" and "wandb" in there
    default = ("tensorboard", "wandb") if wandb else ("tensorboard",)
    return default if experiment.report_to is None else experiment.report_to


def log_callbacks(experiment: Experiment, folder: Path) -> list[Any]:
    """The callbacks of a run's ``trackers``; MissingExtra where one cannot be imported."""
    try:
        return [TRACKERS[name](folder) for name in trackers(experiment)]
    except ImportError as error:
        raise MissingExtra(f"report_to: {error}; install it, or change report_to") from error
