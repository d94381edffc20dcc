"""Sections ``student`` and ``training``: the model that is trained, and its optimisation."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config.base import (
    DropoutRate,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class LoraConfig(Section):
    """LoRA adapters on a frozen pretrained student (extra `lora`)."""

    rank: Positive = 16
    """Rank of the updates."""
    alpha: PositiveFloat = 32.0
    """Updates are scaled by alpha / rank."""
    dropout: DropoutRate = 0.0
    """Dropout on the input of an update."""
    target_modules: tuple[str, ...] | None = None
    """Modules (or tensors of experts) with an update, such as `k_proj`; every linear layer but the
    output if not given."""


class StudentConfig(Section):
    """The student: a pretrained model, or an architecture to train from scratch."""

    model: str | None = None
    """Hub id or folder of a pretrained causal LM to start from."""
    architecture: dict[str, Any] | None = None
    """Instead of `model`: a transformers config to train from scratch; needs `model_type`."""
    tokenizer: str | None = None
    """Hub id or folder; the model's own if not given."""
    chat_template: Literal["corpus", "own"] = "corpus"
    """How prompts and answers are read: as the corpus has them, one after the other, or in the
    tokenizer's own chat template. Plain texts are read as they are."""
    template_date: date | None = None
    """Date that the own chat template prints as today's; needed where it prints one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    lora: LoraConfig | None = None
    """Train LoRA adapters only; all weights if not given."""

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
        if self.template_date is not None and self.chat_template == "corpus":
            raise ValueError("`template_date` needs `chat_template: own`")
        return self


class TrainingConfig(Section):
    """Optimisation, evaluation and checkpoints of stage 2."""

    epochs: PositiveFloat = 1.0
    """Passes over the corpus; ignored if `max_steps` is given."""
    max_steps: Positive | None = None
    """Optimizer steps."""
    batch_size: Positive = 8
    """Samples per device and micro-batch."""
    batching: Literal["plain", "bucketed"] = "plain"
    """`plain`: `batch_size` samples in order. `bucketed`: samples of similar length, up to
    `tokens_per_batch`."""
    tokens_per_batch: Positive | None = None
    """With `bucketed`: student tokens per device and micro-batch, padding included; `batch_size`
    times `max_length` if not given."""
    task_weights: dict[str, NonNegativeFloat] = {}
    """Sampling weight by `task` (for `corpus.parts`, the name of the part): 2 reads its texts twice
    per epoch, 0.5 every other epoch; 1 for tasks that are not listed."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches per optimizer step."""
    max_length: Positive = 512
    """Student tokens per sample; longer texts are truncated."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the student. By default 1e-4 if it is pretrained, and 5e-4 of
    its LoRA adapters."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after warm-up; `constant` has none."""
    warmup_steps: NonNegative | Annotated[float, Field(gt=0, lt=1)] = 0
    """Steps of linear warm-up; below 1, a fraction of all steps. 0.1 by default for a pretrained
    student, where the schedule has a warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are clipped."""
    spike_factor: Annotated[float, Field(gt=1)] = 5.0
    """Warn, naming the samples, when the loss exceeds the median of the last 64 steps by this
    factor."""
    skip_spikes: bool = False
    """Skip the optimizer update of such a step."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Mixed precision of the student; parameters stay float32. `auto`: bfloat16 on a GPU that
    computes in it, else float32; a resumed run keeps to what it began with."""
    gradient_checkpointing: bool = False
    """Recompute the activations of the student's layers in the backward pass: less memory, about a
    third more arithmetic."""
    compile: bool = False
    """`torch.compile` the student's feed-forward blocks and norms. Attention is left out: keys and
    values are read inside it."""
    fused_kernels: bool = True
    """On a GPU with Triton, compare the student with stored codes in one kernel per layer instead
    of decoding, aligning and standardising them first. `false`: never."""
    eval_steps: Positive | None = None
    """Steps between evaluations; there is always one at the end."""
    exact_match_samples: NonNegative = 0
    """Held-out prompts that the student answers at every evaluation, for exact match; samples need
    a prompt and an answer."""
    max_new_tokens: Positive = 256
    """Tokens of such an answer, rationale included, at most."""
    best_metric: Literal["bits_per_character", "perplexity", "exact_match"] = "bits_per_character"
    """Held-out metric that selects the best student."""
    early_stop_patience: Positive | None = None
    """Stop after this many consecutive evaluations without improvement."""
    keep_best: bool = False
    """Keep the best evaluated student instead of the last."""
    save_steps: Positive | None = None
    """Steps between checkpoints; there is always one at the end."""
    keep_checkpoints: Positive = 2
    """Checkpoints to keep; older ones are deleted."""
    log_steps: Positive = 10
    """Steps between entries of the training log."""
    diagnostic_steps: Positive = 50
    """Steps between checks for a moving target (each costs two backward passes)."""
    window_shards: Positive = 4
    """Half the number of shards that are open at once, over all ranks, and mixed."""
    partial_store: bool = False
    """Train on the shards that all teachers have when the run starts, instead of refusing a store
    that lacks some; a resumed run keeps to them."""
    prefetch_threads: Positive = 2
    """Threads that read the next shards."""
    prefetch_steps: Positive = 2
    """Optimizer steps whose batches are collated in advance, in a background thread."""
    device: str = "auto"
    """`auto` or `cpu`."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.tokens_per_batch is not None and self.batching != "bucketed":
            raise ValueError("`tokens_per_batch` requires `batching: bucketed`")
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError("schedule `constant` has no warm-up; use `constant_with_warmup`")
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "`compile` and `gradient_checkpointing` exclude each other: a recomputed layer "
                "would not be the compiled one"
            )
        if self.chooses_best and self.eval_steps is None:
            raise ValueError(
                "`early_stop_patience` and `keep_best` compare evaluations; give `eval_steps`"
            )
        return self

    @property
    def chooses_best(self) -> bool:
        """Whether evaluations are compared with each other."""
        return self.keep_best or self.early_stop_patience is not None
