"""One experiment, as frozen data: everything a run depends on, checked before anything starts.

Unknown keys, wrong types and impossible combinations are refused here, so that nothing behind
this door needs to ask. ``config_file.py`` reads YAML and ``--set`` overrides into ``Experiment``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Self

from pydantic import model_validator

from kvdistill.config.base import Section
from kvdistill.config.corpus import CorpusConfig
from kvdistill.config.distill import (
    AlignmentConfig,
    FusionConfig,
    LossConfig,
    PlaceboConfig,
    ProjectionConfig,
)
from kvdistill.config.extraction import ExtractionConfig, TeacherConfig
from kvdistill.config.latent import LatentConfig
from kvdistill.config.slurm import SlurmConfig
from kvdistill.config.training import StudentConfig, TrainingConfig
from kvdistill.types import CodecSpec, Name


class Experiment(Section):
    """One experiment: one YAML file."""

    name: Name = "experiment"
    """Names the run's folder."""
    preset: str | None = None
    """Named settings to start from, `phase-1` to `phase-5`; what the file says itself wins."""
    store: Path
    """Folder of the key/value store; made by `extract`, read by `train`."""
    output_dir: Path = Path("runs")
    """Each run gets a folder of its own in here."""
    seed: int = 0
    """Seeds the student's initialisation, the data order and dropout."""
    corpus: CorpusConfig
    teachers: dict[Name, TeacherConfig] = {}
    """Teachers by name. The name is a folder in the store."""
    student: StudentConfig
    extraction: ExtractionConfig = ExtractionConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    projection: ProjectionConfig = ProjectionConfig()
    fusion: FusionConfig = FusionConfig()
    losses: LossConfig = LossConfig()
    placebo: PlaceboConfig = PlaceboConfig()
    latent: LatentConfig | None = None
    """Makes the student reason in latent positions; an ordinary language model if not given."""
    training: TrainingConfig = TrainingConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for check in (
            _losses_fit,
            _weights_fit,
            _fusion_fits,
            _projection_fits,
            _evictions_fit,
            _latent_fits,
            _training_fits,
        ):
            check(self)
        return self

    def codec(self, teacher: str) -> CodecSpec:
        """The codec of one teacher: its own, or the extraction's."""
        return self.teachers[teacher].codec or self.extraction.codec

    def extraction_fingerprint(self, teacher: str) -> str:
        """SHA-256 of every setting that changes one teacher's stored numbers.

        Not of the weights, the tokenizer or the corpus: these have fingerprints of their own.
        Settings at their default are left out, so that a setting that a later version adds does
        not make a new extraction of an old store.
        """
        body = self.teachers[teacher].model_dump(
            mode="json",
            exclude={"model", "tokenizer", "trust_remote_code", "device_map", "codec"},
            exclude_defaults=True,
        )
        body["codec"] = self.codec(teacher).model_dump(mode="json")
        body["extraction"] = self.extraction.model_dump(
            mode="json",
            include={"long_text", "max_length", "importance", "hidden_at_cue", "summaries"},
            exclude_defaults=True,
        )
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _losses_fit(experiment: Experiment) -> None:
    losses = experiment.losses
    if not experiment.teachers and losses.uses_teachers:
        raise ValueError(
            f"losses.{losses.of_teachers[0]} needs at least one teacher; add one under `teachers`, "
            "or set the losses of keys and values to 0"
        )
    if not (losses.uses_teachers or losses.cross_entropy or losses.rationale):
        raise ValueError("every loss is 0; there is nothing to train on")


def _weights_fit(experiment: Experiment) -> None:
    weights, teachers = experiment.fusion.weights, set(experiment.teachers)
    if weights is None:
        return
    if set(weights) - teachers:
        raise ValueError(
            f"fusion.weights names {sorted(set(weights) - teachers)}, but the teachers are "
            f"{sorted(teachers)}"
        )
    if teachers - set(weights):
        raise ValueError(f"fusion.weights has no weight for {sorted(teachers - set(weights))}")
    if not any(weights.values()):
        raise ValueError("fusion.weights are all 0")


def _fusion_fits(experiment: Experiment) -> None:
    fusion, losses = experiment.fusion, experiment.losses
    if fusion.method == "similarity" and not experiment.extraction.summaries:
        raise ValueError(
            "fusion.method similarity compares hidden states that extraction must keep; set "
            "extraction.summaries: true (and extract anew under other teacher names)"
        )
    if losses.entropy and not fusion.learns:
        raise ValueError(
            f"losses.entropy regularises a learned router, but fusion.method is {fusion.method}; "
            "use mlp, gate or attention, or set it to 0"
        )


def _evictions_fit(experiment: Experiment) -> None:
    for name, teacher in experiment.teachers.items():
        if teacher.eviction is None:
            continue
        if teacher.eviction.ranks and not experiment.extraction.importance:
            raise ValueError(
                f"teachers.{name}.eviction.method {teacher.eviction.method} ranks tokens by the "
                "attention that they receive; set extraction.importance: true, or use uniform"
            )


def _projection_fits(experiment: Experiment) -> None:
    mode, losses = experiment.projection.mode, experiment.losses
    if mode == "task" and not losses.inject:
        raise ValueError(
            "projection.mode task trains projectors by losses.inject alone; give it a weight"
        )
    if losses.attention_kl and mode in ("student_to_teacher", "shared_space"):
        raise ValueError(
            f"losses.attention_kl needs the target's keys in the student's space, which "
            f"projection.mode {mode} has not; use frozen, task or joint, or set it to 0"
        )
    if mode == "student_to_teacher" and losses.layer_std:
        raise ValueError(
            "losses.layer_std: in projection.mode student_to_teacher every channel of the target "
            "is standardised already; leave it off"
        )
    if (mode == "shared_space") != (losses.round_trip > 0):
        raise ValueError(
            "losses.round_trip keeps a shared space from collapsing: give it a weight in "
            "projection.mode shared_space, and 0 in every other"
        )


def _training_fits(experiment: Experiment) -> None:
    training, corpus = experiment.training, experiment.corpus
    if not training.chooses_best:
        return
    if corpus.eval_path is None and not corpus.eval_samples:
        raise ValueError(
            "training.early_stop_patience and training.keep_best compare evaluations on held-out "
            "samples; give corpus.eval_samples or corpus.eval_path"
        )
    answers = training.exact_match_samples > 0 or experiment.latent is not None
    if training.best_metric == "exact_match" and not answers:
        raise ValueError(
            "training.best_metric exact_match needs answers; give training.exact_match_samples"
        )
    if training.best_metric != "exact_match" and experiment.latent is not None:
        raise ValueError(
            "a latent student is evaluated by its answers; set training.best_metric: exact_match"
        )


def _latent_fits(experiment: Experiment) -> None:
    latent, losses = experiment.latent, experiment.losses
    if (latent is not None) != (experiment.alignment.time == "latent"):
        raise ValueError("`latent` goes with `alignment.time: latent`, and only with it")
    if latent is None:
        for name in ("codi", "rationale"):
            if getattr(losses, name):
                raise ValueError(f"losses.{name} is for a student with a `latent` section")
        return
    refused = [name for name in ("inject", "attention_kl", "relation") if getattr(losses, name)]
    if refused:
        raise ValueError(f"losses.{refused[0]} has no meaning on latent positions; set it to 0")
    if experiment.fusion.learns:
        raise ValueError("fusion of latent targets is `fixed` or by `similarity`, not by a router")
    if experiment.alignment.layers == "cka":
        raise ValueError("alignment.layers cka compares texts token by token, latents have none")
    if losses.of_kv and not latent.positions:
        raise ValueError(f"losses.{losses.of_kv[0]} teaches latents, but latent.method is none")
    ranked = latent.eviction.method in ("importance", "rkv", "rkv_original")
    if losses.of_kv and ranked and not experiment.extraction.importance:
        raise ValueError(
            f"latent.eviction.method {latent.eviction.method} needs extraction.importance"
        )
    if experiment.training.gradient_checkpointing:
        raise ValueError(
            "training.gradient_checkpointing gives up the cache that a latent student thinks with"
        )
    if losses.codi and not experiment.extraction.hidden_at_cue:
        raise ValueError("losses.codi needs extraction.hidden_at_cue: true")
