"""Sections of stage 2: alignment, projection, fusion, losses, placebos and latent reasoning."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config.base import (
    DropoutRate,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from kvdistill.types import (
    KINDS,
    Distance,
    EvictionMethod,
    FusionMethod,
    Granularity,
    Kind,
    LayerMethod,
    Name,
    ProjectionInit,
    ProjectionMode,
    RopeMethod,
    SegmentName,
    Similarity,
    TimeMethod,
    TokenMethod,
)

TEACHER_LOSSES: Final = (
    "key", "value", "cosine", "attention_kl", "relation", "inject", "round_trip", "codi", "logits",
    "hidden",
)  # fmt: skip
"""Losses that read the store."""
ANNEALED_LOSSES: Final = (
    "key", "value", "cosine", "attention_kl", "relation", "codi", "logits", "hidden"
)  # fmt: skip
"""Losses that compare the student with a teacher."""
TEXT_LOSSES: Final = ("cross_entropy", "rationale", "router_aux")
"""Losses on the text alone."""


class AlignmentConfig(Section):
    """How positions and layers of a teacher map to those of the student."""

    time: TimeMethod = "tokens"
    """How positions are matched. `tokens`: by shared characters. `segments`, `global`: by linear
    resampling per segment or over the whole text, for teachers that read a text other than the
    student's. `latent`: the tokens kept by `latent.eviction`, in order, to latent positions."""
    tokens: TokenMethod = "iou"
    """Weight of a teacher token for a student token: intersection over union of their characters
    (`iou`), number of shared characters (`overlap`), or 1 for the best match (`nearest`)."""
    causal: bool = False
    """Use only teacher tokens that end no later than the student token."""
    layers: LayerMethod = "ratio"
    """How student layers map to a depth of the teacher."""
    explicit_layers: dict[str, tuple[NonNegativeFloat, ...]] | None = None
    """With `layers: explicit`: per teacher, a teacher layer for every student layer; 5.25
    interpolates between layers 5 and 6."""
    rope: RopeMethod = "student"
    """Rotary embedding of the target keys in `losses.attention_kl`: the student's own (`student`),
    stretched by `rope_factor` (`linear`, `ntk`, `dynamic`), or `none`."""
    rope_factor: PositiveFloat = 1.0
    """Ratio of the context lengths of teacher and student."""

    @model_validator(mode="after")
    def _explicit(self) -> Self:
        if (self.layers == "explicit") != (self.explicit_layers is not None):
            raise ValueError("`layers: explicit` and `explicit_layers` require each other")
        return self


class ProjectionConfig(Section):
    """The map between the teacher's key/value space and the student's."""

    mode: ProjectionMode = "student_to_teacher"
    """What is trained. `student_to_teacher`: a head maps the student's KV to the fixed teacher KV.
    `frozen`: a fixed projector maps the teacher's KV to the student's space. `task`: that projector
    is trained by `losses.inject` alone. `joint`: it is trained by the K/V loss too, which it can
    absorb. `shared_space`: all models map into one space. `identity`: no map and no
    standardisation, for a teacher of the student's own shape."""
    method: Literal["linear", "full", "bottleneck"] = "linear"
    """Teacher-to-student map: over head dims, then over heads (`linear`), one joint matrix
    (`full`), or a two-layer MLP (`bottleneck`)."""
    init: ProjectionInit | None = None
    """Initial weights of the maps. `ridge`: regression on a pilot, of heads (mode
    `student_to_teacher`), of projectors and of a shared space. `pca`: whitened PCA of the teacher,
    for projectors. `grouped_mean`, `orthogonal`: fixed or random projectors, and random heads. If
    not given, `ridge` for a pretrained student; else `pca` in mode `frozen` and `grouped_mean` in
    others."""
    mlp_ratio: PositiveFloat = 0.5
    """Hidden width of the bottleneck over the geometric mean of its input and output width."""
    hidden: NonNegative = 0
    """Width of a hidden layer in heads of `student_to_teacher`, beside the linear map; 0 for none.
    It starts at zero, so heads start linear."""
    pilot_batches: Positive = 8
    """Batches of 8 texts from which `init: pca`, `init: ridge` and `alignment.layers: cka` are
    computed. Every fourth text is held out from the fit, to choose the ridge penalty and to report
    the variance explained."""
    space_heads: Positive = 2
    """Heads of the shared space."""
    space_dim: Positive = 64
    """Head dim of the shared space."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of heads, projectors and routers. If not given, 1e-3 for a pretrained
    student, else `training.learning_rate`."""

    def first_weights(self, *, pretrained: bool) -> ProjectionInit:
        """``init``, or the default of the mode and of a student that is ``pretrained`` or not."""
        if self.init is not None:
            return self.init
        if pretrained and self.has_closed_form:
            return "ridge"
        return "pca" if self.mode == "frozen" else "grouped_mean"

    @property
    def has_closed_form(self) -> bool:
        """Whether the maps of this mode can be fitted to a pilot."""
        if self.mode in ("student_to_teacher", "shared_space"):
            return True
        return self.mode in ("frozen", "task", "joint") and self.method != "bottleneck"

    @model_validator(mode="after")
    def _init_fits(self) -> Self:
        if self.init in ("pca", "ridge") and not self.has_closed_form:
            what = "a bottleneck" if self.method == "bottleneck" else f"mode {self.mode}"
            raise ValueError(f"init {self.init} has no closed form for {what}; leave it out")
        if self.init == "pca" and self.mode == "shared_space":
            raise ValueError("init pca does not fit mode shared_space; use ridge")
        if self.mode == "frozen" and self.method == "bottleneck":
            raise ValueError("a frozen bottleneck would stay random; use linear or full")
        if self.hidden and self.mode != "student_to_teacher":
            raise ValueError(
                f"`hidden` belongs to heads of mode student_to_teacher, got mode {self.mode}; set "
                "it to 0, or use method bottleneck"
            )
        return self


class BalanceConfig(Section):
    """How strongly each teacher moves the student's keys and values.

    In projection mode `student_to_teacher`, where every teacher has an error of its own.
    """

    method: Literal["none", "explained", "gradnorm", "pcgrad"] = "none"
    """`explained`: in proportion to the variance that a teacher's regression explains. `gradnorm`:
    gradients of equal norm. `pcgrad`: gradients that conflict in a sample are projected off each
    other."""
    momentum: DropoutRate = 0.9
    """Momentum of the running sums over steps that `explained` and `gradnorm` measure with."""
    factors: dict[str, NonNegativeFloat] = {}
    """Constant factor by teacher, on top of `method`; 1 for teachers that are not listed."""
    spans: dict[str, tuple[Fraction, Fraction]] = {}
    """Part of the training in which a teacher moves the student, as fractions from start to end: a
    curriculum, such as `{minilm: [0, 0.4], smollm2: [0.4, 1]}`; all of it for others."""

    @property
    def active(self) -> bool:
        """Whether gradients are anything but added up."""
        return self.method != "none" or bool(self.factors) or bool(self.spans)

    @model_validator(mode="after")
    def _spans_are_not_empty(self) -> Self:
        for name, (start, end) in self.spans.items():
            if start >= end:
                raise ValueError(f"spans.{name}: expected start < end, got [{start:g}, {end:g}]")
        return self


class FusionConfig(Section):
    """How several teachers are combined into one target."""

    method: FusionMethod = "fixed"
    """Source of the fusion weights. `fixed`: `weights`. `similarity`: how close a text is to each
    teacher's prototypes. `confidence`: how likely each teacher found it. `mlp`, `gate`,
    `attention`: a learned router."""
    weights: dict[str, NonNegativeFloat] | None = None
    """With `fixed`: a weight per teacher, normalised to sum to one; uniform if not given."""
    by_task: dict[str, dict[str, NonNegativeFloat]] | None = None
    """With `fixed`: weights for the samples of a task (or part), such as `{math: {smollm2: 1}}`;
    teachers that are not named have none there. `weights` for samples of other tasks."""
    layers: dict[str, tuple[NonNegative, ...]] | None = None
    """Student layers that a teacher supervises, by teacher; all layers for teachers that are not
    listed. With disjoint layers, teachers do not compete for the student's channels."""
    granularity: Granularity = "sample"
    """Unit that is weighted separately: each `sample` or `token`; also each `layer` by a router,
    or each `segment` by `confidence`."""
    smoothing: NonNegative = 16
    """With `confidence` by `token`: characters on either side that are averaged over."""
    encoder_share: Fraction | None = None
    """With `confidence`: weight of all encoders, which predict no text; uniform if not given."""
    warmup_steps: NonNegative = 0
    """Steps for which router weights stay uniform. With injection, projectors need time to settle:
    a router trained from step 0 tends to choose the teacher that contributes least."""
    task_tag: bool = False
    """Condition the router on the `task` of a sample."""
    similarity: Similarity = "cosine"
    """Similarity measure of `method: similarity`."""
    prototypes: Literal["mean", "cls", "kmeans"] = "mean"
    """Prototype of a teacher: mean hidden state, mean first-token state, or the nearest of several
    k-means centres."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of `similarity`, and of `confidence` in nats per character (try 0.1);
    small values approach a hard choice."""
    entropy: Literal["diverse", "specialized"] = "diverse"
    """Whether `losses.entropy` rewards high (`diverse`) or low (`specialized`) router entropy."""
    teacher_dropout: DropoutRate = 0.0
    """Probability of dropping a teacher for a sample."""
    balance: BalanceConfig = BalanceConfig()
    """A balance between teachers, of which one may crowd out the others."""

    @property
    def learns(self) -> bool:
        """Whether the weights come from a learned router."""
        return self.method in ("mlp", "gate", "attention")

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        for name in ("weights", "by_task"):
            if getattr(self, name) is not None and self.method != "fixed":
                raise ValueError(f"`{name}` require method fixed, got method {self.method}")
        by_confidence, unit = self.method == "confidence", self.granularity
        routed = unit == "layer" or (unit == "token" and not by_confidence)
        if (routed or self.task_tag or self.warmup_steps) and not self.learns:
            raise ValueError(
                "granularity, task_tag and warmup_steps require a router (method mlp, gate or "
                f"attention), got method {self.method}"
            )
        if (unit == "segment" or self.encoder_share is not None) and not by_confidence:
            raise ValueError(
                "granularity segment and encoder_share require method confidence, got method "
                f"{self.method}"
            )
        return self


class PlaceboConfig(Section):
    """Uninformative targets for control arms: a gain that they share is not knowledge transfer."""

    method: Literal["none", "shuffled", "noise"] = "none"
    """`shuffled`: keys and values of another text of similar length. `noise`: Gaussian, with the
    stored mean and variance of every channel."""
    teachers: tuple[Name, ...] | None = None
    """Teachers whose targets are replaced; all of them if not given."""
    seed: NonNegative = 0
    """Seed of the permutation or the noise, independent of the run's `seed`."""


class LossConfig(Section):
    """Weights of the losses; a weight of zero disables the loss."""

    key: NonNegativeFloat = 3.0
    """Error of keys, before rotation; 0.3 by default for a pretrained student."""
    value: NonNegativeFloat = 3.0
    """Error of values; 0.3 by default for a pretrained student."""
    anneal_by: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of training over which the losses that compare the student with a teacher (`key`,
    `value`, `cosine`, `attention_kl`, `relation`, `codi`, `logits`, `hidden`) are annealed linearly
    to zero; constant weights if not given."""
    distance: Distance = "mse"
    """Pointwise error between keys or values of student and target."""
    layer_std: bool = False
    """Divide the error of each layer by the standard deviation of the target in that layer."""
    cosine: NonNegativeFloat = 0.0
    """1 - cosine of keys and of values, per head."""
    attention_kl: NonNegativeFloat = 0.0
    """KL divergence between the student's attention on the target keys and on its own keys."""
    relation: NonNegativeFloat = 0.0
    """KL divergence of key-key and value-value relations between tokens; shapes may differ."""
    relation_heads: Positive = 1
    """Relation heads; must divide heads times head dim of student and teachers."""
    cross_entropy: NonNegativeFloat = 1.0
    """Next-token cross-entropy on the text."""
    cross_entropy_prompt: bool = True
    """Include prompt tokens in the cross-entropy; without them only the response is learned, as it
    always is of a conversation (`corpus.columns.messages`)."""
    logits: NonNegativeFloat = 0.0
    """KL divergence from the teachers' stored predictions of the next token to the student's
    (needs `extraction.logits`)."""
    logits_temperature: PositiveFloat = 1.0
    """Temperature of `logits`; at any but 1 over the stored tokens alone."""
    hidden: NonNegativeFloat = 0.0
    """Error of a linear map of every layer's output to the teacher layer's (needs
    `extraction.hidden`)."""
    inject: NonNegativeFloat = 0.0
    """Cross-entropy of what follows when the student runs on the fused KV of its teachers."""
    inject_style: Literal["residual", "replace"] = "residual"
    """Add the fused KV to the student's own through a gate, or replace the student's own."""
    inject_gate_init: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Initial opening of the gates of `inject_style: residual`."""
    inject_segments: tuple[SegmentName, ...] = ("prompt",)
    """Segments whose KV are injected; the loss covers what follows."""
    inject_fraction: Fraction = 0.5
    """Leading fraction of the text that is injected in samples without any of these segments."""
    codi: NonNegativeFloat = 0.0
    """Error of a latent student's hidden states before the answer against the teacher's at the
    same place (needs `extraction.hidden_at_cue`)."""
    rationale: NonNegativeFloat = 0.0
    """Cross-entropy of a latent student on the written rationale and answer, given the question."""
    router_aux: NonNegativeFloat | None = None
    """Load-balancing loss of a mixture-of-experts student's own routers; the weight in the model's
    config (`router_aux_loss_coef`) if not given."""
    entropy: NonNegativeFloat = 0.0
    """Weight of the router entropy; its sign is `fusion.entropy`."""
    round_trip: NonNegativeFloat = 0.0
    """Reconstruction error of mapping into the shared space and back."""

    @property
    def of_teachers(self) -> list[str]:
        """Enabled losses that need the store."""
        return [name for name in TEACHER_LOSSES if getattr(self, name)]

    @property
    def of_kv(self) -> list[str]:
        """Enabled losses that compare keys and values, or hidden states in their manner."""
        return [name for name in self.of_teachers if name not in ("codi", "logits")]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is read of a store."""
        return (*KINDS, "hidden") if self.hidden else KINDS

    @property
    def uses_teachers(self) -> bool:
        """Whether any enabled loss needs the store."""
        return bool(self.of_teachers)

    def weights(self) -> dict[str, float]:
        """Weight by name of loss."""
        names = (*TEACHER_LOSSES, "entropy", *TEXT_LOSSES)
        return {name: getattr(self, name) or 0.0 for name in names}


class EvictionConfig(Section):
    """Which tokens of the teacher's rationale the latent positions are trained on."""

    method: EvictionMethod = "rkv"
    """How tokens are ranked, per layer and head; `random` and `uniform` are controls."""
    budget: Positive | None = None
    """Tokens that are kept; `num_latents`, which is also the maximum, if not given. With fewer, the
    last latent positions have no target."""
    mix: Fraction = 0.1
    """Weight of importance in the R-KV scores, lambda."""
    seed: NonNegative = 0
    """Seed of `random`."""


class LatentConfig(Section):
    """A student that reasons in latent positions instead of words."""

    method: Literal["none", "pause", "codi", "pccot"] = "pccot"
    """`pccot`: all latents in parallel, refined `iterations` times (Jacobi). `codi`: one after the
    other. `pause`: latents without refinement. `none`: no latents; the answer follows the
    question."""
    num_latents: Positive = 24
    """Latent positions."""
    iterations: NonNegative = 3
    """Refinements of `pccot`; 0 is equivalent to `pause`, `num_latents` to `codi`."""
    projector_width: Positive = 2048
    """Hidden width of the map from a hidden state to the next latent's input."""
    dropout: DropoutRate = 0.0
    """Dropout before that map."""
    eviction: EvictionConfig = EvictionConfig()
    """Which teacher tokens are the targets of the latents."""
    shuffle_targets: bool = False
    """Placebo: every sample is trained on the keys and values of the next one in its batch."""
    max_new_tokens: Positive = 32
    """Tokens of a generated answer, at most."""

    @property
    def positions(self) -> int:
        """Latent positions of this method."""
        return 0 if self.method == "none" else self.num_latents

    @property
    def budget(self) -> int:
        """Teacher tokens per layer and head."""
        return self.eviction.budget or self.num_latents

    @model_validator(mode="after")
    def _eviction_fits(self) -> Self:
        if self.eviction.method == "full":
            raise ValueError(
                "eviction.method full keeps more tokens than there are latents; use right_crop"
            )
        if self.budget > self.num_latents:
            raise ValueError(
                f"eviction.budget is {self.budget}, but there are only {self.num_latents} latents"
            )
        return self
