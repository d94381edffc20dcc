"""Stage 2's student and its optimisation as settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config.base import NonNegativeFloat, Positive, PositiveFloat, Section


class LoraConfig(Section):
    """Low-rank updates of a pretrained student whose own weights stay (extra `lora`)."""

    rank: Positive = 16
    """Width of the updates."""
    alpha: PositiveFloat = 32.0
    """Updates are scaled by alpha over rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before an update."""
    target_modules: tuple[str, ...] | None = None
    """Names of the modules that get one, such as `k_proj`; every linear layer if not given."""


class StudentConfig(Section):
    """The model that learns."""

    model: str | None = None
    """Hub id or folder of a pretrained causal LM to start from."""
    architecture: dict[str, Any] | None = None
    """Instead of `model`: a transformers config to start from scratch; needs `model_type`."""
    tokenizer: str | None = None
    """Hub id or folder; the model's own if not given."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    lora: LoraConfig | None = None
    """Train low-rank updates alone; all weights if not given."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give exactly one of `model` and `architecture`")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("`architecture` needs `model_type`, such as llama")
        if self.architecture is not None and self.tokenizer is None:
            raise ValueError("a student from scratch needs `tokenizer`")
        if self.lora is not None and self.model is None:
            raise ValueError("`lora` adapts a pretrained student; give `model`")
        return self


class TrainingConfig(Section):
    """Stage 2's optimisation."""

    epochs: PositiveFloat = 1.0
    """Passes over the corpus; ignored where `max_steps` is given."""
    max_steps: Positive | None = None
    """Optimizer steps."""
    batch_size: Positive = 8
    """Samples per device and step."""
    batching: Literal["plain", "bucketed"] = "plain"
    """`plain`: `batch_size` samples as they come. `bucketed`: samples of like length, as many as
    `tokens_per_batch` holds."""
    tokens_per_batch: Positive | None = None
    """With `bucketed`: student tokens per device and batch, padding included; `batch_size` times
    `max_length` if not given."""
    task_weights: dict[str, NonNegativeFloat] = {}
    """How often an epoch reads a text, by its `task` (for `corpus.parts`, the part's name): 2 is
    twice, 0.5 every other epoch; 1 for tasks that are not named."""
    gradient_accumulation_steps: Positive = 1
    """Batches per optimizer step."""
    max_length: Positive = 512
    """Student tokens per sample; the rest of a longer text is cut off."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the student."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after warm-up; `constant` has none."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    spike_factor: Annotated[float, Field(gt=1)] = 5.0
    """Warn, naming the samples, when a step's loss is this many times the median of the last 64."""
    skip_spikes: bool = False
    """Leave the weights as they are in such a step."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Mixed precision of the student; parameters stay float32."""
    gradient_checkpointing: bool = False
    """Compute the student's layers again in the backward pass instead of keeping their
    activations: less memory, about a third more arithmetic."""
    compile: bool = False
    """`torch.compile` the student's feed-forward blocks and norms. Attention stays as it is: keys
    and values are read inside it."""
    eval_steps: Positive | None = None
    """Evaluate every so many steps (always at the end)."""
    exact_match_samples: Annotated[int, Field(ge=0)] = 0
    """At every evaluation, let the student answer this many held-out prompts and count the right
    answers; samples need a prompt and an answer."""
    max_new_tokens: Positive = 256
    """Room for such an answer, its rationale included."""
    best_metric: Literal["bits_per_character", "perplexity", "exact_match"] = "bits_per_character"
    """Which figure of the held-out samples says that one student is better than another."""
    early_stop_patience: Positive | None = None
    """End training after so many evaluations in a row without a better one."""
    keep_best: bool = False
    """The final student is the best one that was evaluated, not the last."""
    save_steps: Positive | None = None
    """Write a checkpoint every so many steps (always at the end)."""
    keep_checkpoints: Positive = 2
    """Older checkpoints are deleted."""
    log_steps: Positive = 10
    """Log losses every so many steps."""
    diagnostic_steps: Positive = 50
    """Every so many steps, measure whether the target moves (costs two backward passes)."""
    window_shards: Positive = 4
    """Samples are shuffled inside a window of this many decoded shards."""
    prefetch_threads: Positive = 2
    """Threads that read the next window's shards while one is used."""
    prefetch_steps: Positive = 2
    """Optimizer steps whose batches are collated ahead of need, in a thread."""
    device: str = "auto"
    """`auto` or `cpu`."""

    @model_validator(mode="after")
    def _budget_is_used(self) -> Self:
        if self.tokens_per_batch is not None and self.batching != "bucketed":
            raise ValueError("`tokens_per_batch` goes with `batching: bucketed`, and only with it")
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError("schedule `constant` has no warm-up; use `constant_with_warmup`")
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "`compile` and `gradient_checkpointing` do not go together: a layer that is "
                "computed again would not be the compiled one"
            )
        if self.chooses_best and self.eval_steps is None:
            raise ValueError(
                "`early_stop_patience` and `keep_best` compare evaluations; give `eval_steps`"
            )
        return self

    @property
    def chooses_best(self) -> bool:
        """Whether evaluations are compared with one another."""
        return self.keep_best or self.early_stop_patience is not None
