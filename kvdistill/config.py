"""One experiment, as frozen data: everything a run depends on, checked before anything starts.

Unknown keys, wrong types and impossible combinations are refused here, so that nothing behind
this door needs to ask. ``config_file.py`` reads YAML and ``--set`` overrides into ``Experiment``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config_base import NonNegativeFloat, Positive, Section
from kvdistill.config_corpus import CorpusConfig
from kvdistill.config_distill import (
    AlignmentConfig,
    FusionConfig,
    LossConfig,
    PlaceboConfig,
    ProjectionConfig,
)
from kvdistill.config_latent import LatentConfig
from kvdistill.config_slurm import SlurmConfig
from kvdistill.config_training import StudentConfig, TrainingConfig
from kvdistill.types import Backend, CodecSpec, Name, StoredEviction


class GenerateConfig(Section):
    """How a teacher samples a rationale of its own for every prompt."""

    temperature: NonNegativeFloat = 0.7
    """Softmax temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Only the likeliest tokens that hold this much probability are drawn from."""
    max_new_tokens: Positive = 256
    """Tokens of a rationale at most."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a rationale, such as `"\\n####"`; they are left out of it."""
    seed: int = 0
    """Seed of all draws."""
    draw: Annotated[int, Field(ge=0)] = 0
    """Which draw: several rationales per prompt are several teachers with draws 0, 1, …"""


class TeacherConfig(Section):
    """One teacher: a model, how it is prompted, and what of it is kept."""

    model: str
    """Hub id or local folder."""
    revision: str | None = None
    """Hub revision; pin a commit for a run that must be repeatable."""
    gguf_file: str | None = None
    """File name inside the model's folder, where the weights are GGUF."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    weights: Literal["trained", "random"] = "trained"
    """`random`: the architecture with weights drawn anew, a placebo for what the model learned."""
    stream: Literal["encoder", "decoder", "cross"] | None = None
    """Which attention of an encoder-decoder is read; only for these, and required for them."""
    template: str | None = None
    """How a sample is put to this teacher, such as `"Q: {prompt}\\nA:{rationale}{answer}"`; the
    text as it is if not given. The same model under two templates is two teachers."""
    chat: bool = False
    """Put samples into the tokenizer's chat template: the prompt is the user's turn."""
    system: str | None = None
    """System message of the chat template."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token. `auto`: as the tokenizer does it, and always for Gemma."""
    generate: GenerateConfig | None = None
    """Store the teacher's own rationales instead of the corpus's."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Layers to keep; all of them if not given."""
    heads: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Key/value heads to keep of every layer; all of them if not given."""
    eviction: StoredEviction | None = None
    """Store only some tokens; everything if not given, and evict when streaming."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the teacher's forward pass."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention kernel of the teacher's forward pass; `sdpa` is eager where a model has none."""
    device_map: Literal["auto"] | None = None
    """`auto`: spread a model that is too large for one GPU over all visible ones."""
    codec: CodecSpec | None = None
    """How keys and values are stored; `extraction.codec` if not given."""

    @model_validator(mode="after")
    def _one_view(self) -> Self:
        if self.chat and self.template is not None:
            raise ValueError("give `template` or `chat`, not both")
        if self.system is not None and not self.chat:
            raise ValueError("`system` needs `chat: true`")
        if self.stream == "decoder" and (self.chat or self.template is not None):
            raise ValueError("stream `decoder` reads the prompt and the rest; it has no template")
        if self.weights == "random" and (self.gguf_file is not None or self.device_map is not None):
            raise ValueError("`weights: random` goes with neither `gguf_file` nor `device_map`")
        if self.generate is not None and self.stream is not None:
            raise ValueError("`generate` is for decoders; it does not go with `stream`")
        return self


class ExtractionConfig(Section):
    """Stage 1: reading the teachers into the store."""

    backend: Backend = "zarr"
    """`zarr`: compressed, for disks and shared file systems. `safetensors`: fastest to read."""
    codec: CodecSpec = CodecSpec()
    """How keys and values are stored, per kind."""
    batch_tokens: Positive = 4096
    """Tokens per forward pass, padding included; halved by itself when memory runs out."""
    long_text: Literal["error", "truncate", "skip"] = "error"
    """What to do with a text that is longer than the teacher's positions."""
    max_length: Positive | None = None
    """Treat texts of more tokens than this as too long, even if the teacher could read them."""
    importance: bool = True
    """Keep the attention that every token receives from the answer; evictions rank by it."""
    hidden_at_cue: bool = False
    """Keep every layer's hidden state at the token before the answer (for the CODI loss)."""
    summaries: bool = False
    """Keep every sample's mean and first hidden state, and the router's prototypes of them."""
    prototypes: Positive = 8
    """Centres of the k-means prototypes, where `summaries` are kept."""
    writers: Positive = 1
    """Shards that may wait to be compressed and written while the next one is read."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""


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
