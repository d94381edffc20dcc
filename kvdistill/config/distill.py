"""Stage 2's mathematics as settings: alignment, projection, fusion, losses."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config.base import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section
from kvdistill.types import (
    Distance,
    FusionMethod,
    Granularity,
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


class AlignmentConfig(Section):
    """How positions and layers of a teacher map to the student's."""

    time: TimeMethod = "tokens"
    """`tokens`: by shared characters. `segments`, `global`: linear resampling, for teachers
    whose text is not the student's. `latent`: the tokens that `latent.eviction` keeps, in order,
    for the student's latent positions."""
    tokens: TokenMethod = "iou"
    """Weight of a teacher token: characters shared over characters in either (`iou`), characters
    shared (`overlap`), or all to the best one (`nearest`)."""
    causal: bool = False
    """Keep only teacher tokens that end no later than the student's token."""
    layers: LayerMethod = "ratio"
    """How student layers pick a depth of the teacher."""
    explicit_layers: dict[str, tuple[NonNegativeFloat, ...]] | None = None
    """With `layers: explicit`: per teacher, a teacher layer for every student layer; 5.25 mixes
    layers 5 and 6."""
    rope: RopeMethod = "student"
    """How the target's keys are rotated for `losses.attention_kl`: `student`, as the student's
    own; `linear`, `ntk`, `dynamic`: stretched by `rope_factor`; `none`: not at all."""
    rope_factor: PositiveFloat = 1.0
    """Ratio of the context lengths of teacher and student."""

    @model_validator(mode="after")
    def _explicit(self) -> Self:
        if (self.layers == "explicit") != (self.explicit_layers is not None):
            raise ValueError("`explicit_layers` goes with `layers: explicit`, and only with it")
        return self


class ProjectionConfig(Section):
    """Between the teacher's head space and the student's."""

    mode: ProjectionMode = "student_to_teacher"
    """Who may move. `student_to_teacher`: regress the student's KV onto the fixed teacher KV.
    `frozen`: a fixed teacher-to-student projector gives the target. `task`: the projector learns
    from `losses.inject` alone. `joint`: it learns from the K/V loss too, and can absorb it.
    `shared_space`: every model maps into one space. `identity`: no map and no standardising, for
    a teacher of the student's own shape."""
    method: Literal["linear", "full", "bottleneck"] = "linear"
    """Teacher-to-student map: head dim then heads (`linear`), one joint map (`full`), or a
    narrower non-linear middle (`bottleneck`)."""
    init: ProjectionInit | None = None
    """First weights of the map; whitened `pca` where it is frozen, else `grouped_mean`."""
    mlp_ratio: PositiveFloat = 0.5
    """Width of the bottleneck's middle, as a share of the geometric mean of both widths."""
    pilot_batches: Positive = 8
    """Batches that `init: pca` and `ridge`, and `alignment.layers: cka`, are measured on."""
    space_heads: Positive = 2
    """Heads of the shared space."""
    space_dim: Positive = 64
    """Head dim of the shared space."""
    learning_rate: PositiveFloat | None = None
    """Learning rate of projectors and routers; `training.learning_rate` if not given."""

    @property
    def first_weights(self) -> ProjectionInit:
        """`init`, or the mode's own choice."""
        if self.init is not None:
            return self.init
        return "pca" if self.mode == "frozen" else "grouped_mean"

    @model_validator(mode="after")
    def _init_fits(self) -> Self:
        if self.init in ("pca", "ridge") and self.method == "bottleneck":
            raise ValueError(f"init {self.init} has no closed form for a bottleneck")
        if self.mode == "frozen" and self.method == "bottleneck":
            raise ValueError("a frozen bottleneck would stay random; use linear or full")
        return self


class FusionConfig(Section):
    """How several teachers make one target."""

    method: FusionMethod = "fixed"
    """`fixed`: given weights. `similarity`: how typical a text is of each teacher. `mlp`, `gate`,
    `attention`: a router that learns."""
    weights: dict[str, NonNegativeFloat] | None = None
    """With `fixed`: a weight per teacher, normalised to sum to one; uniform if not given."""
    layers: dict[str, tuple[Annotated[int, Field(ge=0)], ...]] | None = None
    """Student layers that a teacher teaches, by its name; a teacher that is not named teaches all.
    Teachers with layers of their own need not share the student's few channels."""
    granularity: Granularity = "sample"
    """What a router gives its own weights to: each `sample`, `layer` or `token`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps during which a router's weights stay uniform. Injected projectors need some to settle:
    a router that chooses before they have picks the teacher that does the least."""
    task_tag: bool = False
    """Tell the router a sample's `task`."""
    similarity: Similarity = "cosine"
    """What likeness is, with `method: similarity`."""
    prototypes: Literal["mean", "cls", "kmeans"] = "mean"
    """What a teacher is compared by: its mean, its first token, or the nearest of its centres."""
    temperature: PositiveFloat = 1.0
    """Small: one teacher takes all."""
    entropy: Literal["diverse", "specialized"] = "diverse"
    """What `losses.entropy` asks of a router."""
    teacher_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a sample goes without one of its teachers, so that none is indispensable."""

    @property
    def learns(self) -> bool:
        """Whether the weights come from a router."""
        return self.method in ("mlp", "gate", "attention")

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.weights is not None and self.method != "fixed":
            raise ValueError(f"weights are given, but method {self.method} finds its own")
        routed = self.granularity != "sample" or self.task_tag or self.warmup_steps
        if routed and not self.learns:
            raise ValueError(
                f"granularity, task_tag and warmup_steps are a router's; method is {self.method}"
            )
        return self


class PlaceboConfig(Section):
    """Targets that know nothing of their text: what they gain too is not knowledge."""

    method: Literal["none", "shuffled", "noise"] = "none"
    """`shuffled`: another text's keys and values, of like length. `noise`: Gaussian, with the
    stored mean and variance of every channel."""
    teachers: tuple[Name, ...] | None = None
    """Only these teachers'; all teachers' if not given."""
    seed: int = 0
    """Decides the partners, or the noise; the same for every seed of a run."""


class LossConfig(Section):
    """Weights of the losses; zero switches one off."""

    key: NonNegativeFloat = 3.0
    """Error of keys, before rotation."""
    value: NonNegativeFloat = 3.0
    """Error of values."""
    anneal_by: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the steps by which all losses against teachers but `inject` have fallen linearly to
    zero; they keep their weights if not given."""
    distance: Distance = "mse"
    """How a difference between keys or values is measured."""
    layer_std: bool = False
    """Divide each layer's error by the target's standard deviation in that layer."""
    cosine: NonNegativeFloat = 0.0
    """1 - cosine of keys and values, per head."""
    attention_kl: NonNegativeFloat = 0.0
    """KL of what the student attends to, with the target's keys and with its own."""
    relation: NonNegativeFloat = 0.0
    """KL of key-key and value-value relations between tokens; needs no equal shapes."""
    relation_heads: Positive = 1
    """Relation heads; must divide heads times dim of student and teachers."""
    cross_entropy: NonNegativeFloat = 1.0
    """Next-token cross-entropy on the text."""
    cross_entropy_prompt: bool = True
    """Whether the words of a prompt count in it; off, the student learns to answer alone."""
    inject: NonNegativeFloat = 0.0
    """Cross-entropy of what follows when the student runs on the teachers' fused KV."""
    inject_style: Literal["residual", "replace"] = "residual"
    """Add the fused KV to the student's own through a gate, or put it in its place."""
    inject_gate_init: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """How far the gates of `residual` are open at first."""
    inject_segments: tuple[SegmentName, ...] = ("prompt",)
    """Where the fused KV goes in; the loss counts what follows."""
    inject_fraction: Fraction = 0.5
    """How much of a sample without such segments the fused KV goes into."""
    codi: NonNegativeFloat = 0.0
    """Error of a latent student's hidden states before the answer, against the teacher's at the
    same place (needs `extraction.hidden_at_cue`)."""
    rationale: NonNegativeFloat = 0.0
    """Cross-entropy of a latent student on rationale and answer in words, given the question."""
    entropy: NonNegativeFloat = 0.0
    """Weight of the router's entropy; its sign is `fusion.entropy`."""
    round_trip: NonNegativeFloat = 0.0
    """What models lose on the way into the shared space and back."""

    @property
    def of_teachers(self) -> list[str]:
        """Losses with a weight that need the store."""
        return [name for name, weight in self.weights().items() if weight and name in OF_TEACHERS]

    @property
    def of_kv(self) -> list[str]:
        """Losses with a weight that compare keys and values."""
        return [name for name in self.of_teachers if name != "codi"]

    @property
    def uses_teachers(self) -> bool:
        """Whether any loss needs the store."""
        return bool(self.of_teachers)

    def weights(self) -> dict[str, float]:
        """Weight by name of loss."""
        return {name: getattr(self, name) for name in (*OF_TEACHERS, "entropy", *OF_TEXT)}


OF_TEACHERS = (
    "key", "value", "cosine", "attention_kl", "relation", "inject", "round_trip", "codi"
)  # fmt: skip


OF_TEXT = ("cross_entropy", "rationale")
