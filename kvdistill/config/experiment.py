"""The whole experiment file, and the checks that span several sections.

Unknown keys, wrong types and impossible combinations are refused here, before anything starts, so
that later stages need not check them. ``load.py`` builds an ``Experiment`` from YAML and ``--set``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import model_validator

from kvdistill.config.base import NonNegative, Section
from kvdistill.config.corpus import CorpusConfig
from kvdistill.config.distill import (
    AlignmentConfig,
    FusionConfig,
    LatentConfig,
    LossConfig,
    PlaceboConfig,
    ProjectionConfig,
)
from kvdistill.config.extraction import ExtractionConfig, TeacherConfig
from kvdistill.config.slurm import SlurmConfig
from kvdistill.config.training import StudentConfig, TrainingConfig
from kvdistill.types import RANKED_EVICTIONS, CodecSpec, LongText, Name, ProjectionInit, StoreURL

PRETRAINED: Final[dict[str, dict[str, float]]] = {
    "projection": {"learning_rate": 1e-3},
    "losses": {"key": 0.3, "value": 0.3},
    "training": {"learning_rate": 1e-4, "warmup_steps": 0.1},
}
"""Defaults of a pretrained student where they differ, by section (``docs/students.md``)."""

LORA_RATE: Final = 5e-4
"""Default learning rate of LoRA adapters."""


class Experiment(Section):
    """One experiment: one YAML file."""

    name: Name = "experiment"
    """Name of the run, and of its folder under `output_dir`."""
    preset: str | None = None
    """Named defaults, such as `phase-1` to `phase-5` or `kava`; keys given in the file win."""
    store: StoreURL | Path
    """Folder or bucket (`s3://…`) of the key/value store: written by `extract`, read by `train`."""
    kv_source: Literal["store", "live"] = "store"
    """Where training gets keys and values. `live`: from the teachers themselves, run on every text
    each time that it is due; the store then needs only the first shards, for statistics."""
    output_dir: Path = Path("runs")
    """Parent folder of the run's folder."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None
    """Where curves go beside the run's own logs, through transformers' callbacks. If not given,
    TensorBoard, and Weights & Biases where it is installed and its environment enables it."""
    seed: NonNegative = 0
    """Seed of the student's initialisation, the data order and dropout."""
    corpus: CorpusConfig
    teachers: dict[Name, TeacherConfig] = {}
    """Teachers by name; the name is also a folder in the store."""
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
    def _defaults_of_the_student(self) -> Self:
        """What is given, by the file or a preset, wins."""
        if self.student.model is None:
            return self
        for name, defaults in PRETRAINED.items():
            section = getattr(self, name)
            missing = {k: v for k, v in defaults.items() if k not in section.model_fields_set}
            if name == "training" and section.schedule == "constant":
                missing.pop("warmup_steps", None)  # it has none
            if name == "training" and "learning_rate" in missing and self.student.lora is not None:
                missing["learning_rate"] = LORA_RATE
            object.__setattr__(self, name, section.model_copy(update=missing))
        return self

    @property
    def first_projection(self) -> ProjectionInit:
        """Initial weights of the maps between student and teachers."""
        return self.projection.first_weights(pretrained=self.student.model is not None)

    @property
    def fitted(self) -> Literal["pca", "ridge"] | None:
        """Closed form by which maps are fitted before step 1; None where none are."""
        init, regresses = self.first_projection, self.projection.mode == "student_to_teacher"
        if init not in ("pca", "ridge") or not self.teachers or not self.losses.of_kv:
            return None
        # PCA fits projectors to the student's space, which regression needs for `inject` alone.
        return None if init == "pca" and regresses and not self.losses.inject else init

    @property
    def unfused(self) -> str | None:
        """The setting for which `training.fused_kernels` has no effect; None where it has one."""
        if not self.training.fused_kernels:
            return "training.fused_kernels is false"
        if self.projection.mode != "student_to_teacher":
            return f"projection.mode is {self.projection.mode}"
        if self.latent is not None:
            return "latents learn from evicted tokens"
        names = ("inject", "cosine", "relation")
        found = [f"losses.{name} needs all layers" for name in names if getattr(self.losses, name)]
        return found[0] if found else None

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        _check_losses(self)
        _check_weights(self)
        _check_fusion(self)
        _check_projection(self)
        _check_evictions(self)
        _check_latent(self)
        _check_training(self)
        return self

    def codec(self, teacher: str) -> CodecSpec:
        """The codec of one teacher: its own, or that of ``extraction``."""
        return self.teachers[teacher].codec or self.extraction.codec

    def long_text(self, teacher: str) -> LongText:
        """What one teacher does with texts that are too long."""
        return self.teachers[teacher].long_text or self.extraction.long_text

    def max_length(self, teacher: str) -> int | None:
        """The limit on one teacher's context, beside the model's own."""
        return self.teachers[teacher].max_length or self.extraction.max_length


def _check_losses(experiment: Experiment) -> None:
    losses = experiment.losses
    if not experiment.teachers and losses.uses_teachers:
        raise ValueError(
            f"losses.{losses.of_teachers[0]} needs at least one teacher; add one under `teachers`, "
            "or set losses.key and losses.value to 0"
        )
    if losses.logits and not experiment.extraction.logits:
        raise ValueError(
            "losses.logits reads predictions that extraction must store; set extraction.logits to "
            "a number of tokens, such as 32, and extract under new teacher names"
        )
    if losses.hidden and not experiment.extraction.hidden:
        raise ValueError(
            "losses.hidden reads layers' outputs that extraction must store; set "
            "extraction.hidden: true, and extract under new teacher names"
        )
    if losses.hidden and experiment.projection.mode != "student_to_teacher":
        raise ValueError(
            "losses.hidden maps the student's hidden states to the teacher's, in projection.mode "
            f"student_to_teacher alone; got {experiment.projection.mode}"
        )
    if losses.logits and experiment.placebo.method == "noise":
        raise ValueError("placebo.method noise replaces no predictions; use shuffled")
    if not (losses.uses_teachers or losses.cross_entropy or losses.rationale):
        raise ValueError("every loss has weight 0; enable at least one under `losses`")


def _check_weights(experiment: Experiment) -> None:
    fusion, teachers = experiment.fusion, set(experiment.teachers)
    by_task = {f"by_task.{task}": row for task, row in (fusion.by_task or {}).items()}
    given = by_task if fusion.weights is None else {"weights": fusion.weights, **by_task}
    for name, weights in given.items():
        if unknown := sorted(set(weights) - teachers):
            raise ValueError(
                f"fusion.{name} names {unknown}, but the teachers are {sorted(teachers)}"
            )
        if name == "weights" and teachers - set(weights):
            raise ValueError(f"fusion.weights has no weight for {sorted(teachers - set(weights))}")
        if not any(weights.values()):
            raise ValueError(f"fusion.{name} are all 0; give at least one teacher a weight")


def _check_fusion(experiment: Experiment) -> None:
    fusion, losses = experiment.fusion, experiment.losses
    needs = {"similarity": ("summaries", "hidden states"), "confidence": ("confidence", "nats")}
    setting, what = needs.get(fusion.method, ("confidence", ""))
    if what and not getattr(experiment.extraction, setting):
        raise ValueError(
            f"fusion.method {fusion.method} compares {what} that extraction must store; set "
            f"extraction.{setting}: true and extract under new teacher names"
        )
    balanced = fusion.balance
    for name, given in (("factors", balanced.factors), ("spans", balanced.spans)):
        if unknown := sorted(set(given) - set(experiment.teachers)):
            raise ValueError(
                f"fusion.balance.{name} names {unknown}, but the teachers are "
                f"{sorted(experiment.teachers)}"
            )
    others = [name for name in ("cosine", "relation", "hidden") if getattr(losses, name)]
    if balanced.active and (others or experiment.projection.mode != "student_to_teacher"):
        raise ValueError(
            "fusion.balance acts on losses.key and losses.value in projection.mode "
            f"student_to_teacher, got {f'losses.{others[0]}' if others else 'another mode'}; "
            "leave one of them out"
        )
    if losses.entropy and not fusion.learns:
        raise ValueError(
            f"losses.entropy regularises a learned router, but fusion.method is {fusion.method}; "
            "use mlp, gate or attention, or set it to 0"
        )


def _check_projection(experiment: Experiment) -> None:
    mode, losses = experiment.projection.mode, experiment.losses
    if mode == "task" and not losses.inject:
        raise ValueError(
            "projection.mode task trains projectors by losses.inject alone; give it a weight"
        )
    if losses.attention_kl and mode in ("student_to_teacher", "shared_space"):
        raise ValueError(
            "losses.attention_kl needs target keys in the student's space, but projection.mode is "
            f"{mode}; use frozen, task or joint, or set it to 0"
        )
    if mode == "student_to_teacher" and losses.layer_std:
        raise ValueError(
            "losses.layer_std has no effect in projection.mode student_to_teacher, which already "
            "standardises every channel of the target; leave it off"
        )
    if (mode == "shared_space") != (losses.round_trip > 0):
        raise ValueError(
            "losses.round_trip prevents the collapse of a shared space: give it a weight in "
            "projection.mode shared_space, and 0 in every other mode"
        )


def _check_evictions(experiment: Experiment) -> None:
    extraction = experiment.extraction
    for name, teacher in experiment.teachers.items():
        is_live = experiment.kv_source == "live"
        if teacher.tp_plan is not None and (is_live or experiment.codec(name).transforms):
            raise ValueError(
                f"teachers.{name}.tp_plan: several processes read this teacher, but "
                f"{'kv_source live' if is_live else 'codec klt'} needs one; use device_map: auto"
            )
        if experiment.long_text(name) == "window" and (extraction.importance or teacher.eviction):
            raise ValueError(
                f"teachers.{name}.long_text window: no token of a window attends beyond it, so "
                "extraction.importance and an eviction are undefined; set importance to false and "
                "remove the eviction, or truncate"
            )
        if teacher.eviction and (extraction.stores_predictions or extraction.hidden):
            raise ValueError(
                f"teachers.{name}.eviction keeps other tokens in every layer and head, which have "
                "no extraction.confidence, .logits or .hidden; remove it, and evict in training"
            )
        if teacher.eviction is not None and experiment.codec(name).transforms:
            raise ValueError(
                f"teachers.{name}.eviction keeps other tokens in every layer and head, but codec "
                "klt transforms layers and heads together; use int8, or evict while streaming"
            )
        if extraction.importance:
            continue
        if teacher.eviction is not None and teacher.eviction.ranks:
            raise ValueError(
                f"teachers.{name}.eviction.method {teacher.eviction.method} ranks tokens by the "
                "attention that they receive; set extraction.importance: true, or use uniform"
            )


def _check_latent(experiment: Experiment) -> None:
    latent, losses = experiment.latent, experiment.losses
    if (latent is not None) != (experiment.alignment.time == "latent"):
        raise ValueError("`latent` and `alignment.time: latent` require each other")
    if latent is None:
        for name in ("codi", "rationale"):
            if getattr(losses, name):
                raise ValueError(f"losses.{name} needs a student with a `latent` section")
        return
    undefined = ("inject", "attention_kl", "relation", "logits", "hidden")
    refused = [f"losses.{name}" for name in undefined if getattr(losses, name)]
    refused += ["student.chat_template"] * (experiment.student.chat_template == "own")
    if refused:
        raise ValueError(f"{refused[0]} is undefined on latent positions; leave it out")
    if experiment.fusion.learns:
        raise ValueError(
            f"fusion.method {experiment.fusion.method} is a router, which latent targets do not "
            "support; use fixed, similarity or confidence"
        )
    if experiment.fusion.granularity != "sample":
        raise ValueError("fusion.granularity of latents is sample")
    if experiment.alignment.layers == "cka":
        raise ValueError("alignment.layers cka compares token by token, which latents do not allow")
    if losses.of_kv and not latent.positions:
        raise ValueError(f"losses.{losses.of_kv[0]} needs latents, but latent.method is none")
    method = latent.eviction.method
    if losses.of_kv and method in RANKED_EVICTIONS and not experiment.extraction.importance:
        raise ValueError(f"latent.eviction.method {method} needs extraction.importance: true")
    if experiment.training.gradient_checkpointing:
        raise ValueError(
            "training.gradient_checkpointing drops the cache through which latents are computed; "
            "set it to false"
        )
    if losses.codi and not experiment.extraction.hidden_at_cue:
        raise ValueError("losses.codi needs extraction.hidden_at_cue: true")


def _check_training(experiment: Experiment) -> None:
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
