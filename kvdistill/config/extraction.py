"""Sections ``teachers`` and ``extraction``: what stage 1 reads, and what it stores."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config.base import NonNegative, NonNegativeFloat, Positive, Section
from kvdistill.types import Backend, CodecSpec, LongText, StoredEviction


class GenerateConfig(Section):
    """How a teacher samples a rationale of its own for every prompt."""

    temperature: NonNegativeFloat = 0.7
    """Softmax temperature; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling: probability mass that is sampled from."""
    max_new_tokens: Positive = 256
    """Tokens of a rationale, at most."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a rationale, such as `"\\n####"`; not part of it."""
    seed: NonNegative = 0
    """Random seed of all draws."""
    draw: NonNegative = 0
    """Index of the draw: several rationales per prompt are several teachers with draws 0, 1, …"""


class TeacherConfig(Section):
    """One teacher: a model, its prompt, and what is stored of it."""

    model: str
    """Hub id or local folder."""
    revision: str | None = None
    """Hub revision; pin a commit for reproducible runs."""
    gguf_file: str | None = None
    """File name inside the model's folder, for GGUF weights."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; the model's own if not given."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    weights: Literal["trained", "random"] = "trained"
    """`random`: the same architecture with random weights, as a placebo."""
    stream: Literal["encoder", "decoder", "cross"] | None = None
    """Which attention of an encoder-decoder is stored; required for these, refused for others."""
    template: str | None = None
    """Prompt template, such as `"Q: {prompt}\\nA:{rationale}{answer}"`; the plain text if not
    given. The same model under two templates is two teachers."""
    chat: bool = False
    """Apply the tokenizer's chat template; the prompt is the user's turn."""
    system: str | None = None
    """System message of the chat template."""
    template_date: date | None = None
    """Date that the chat template prints as today's, such as `2026-01-31`. The day of the teacher's
    first extraction if not given; the store records it."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token. `auto`: as the tokenizer does, and always for Gemma."""
    generate: GenerateConfig | None = None
    """Store the teacher's own rationales instead of those of the corpus."""
    parts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Parts of the corpus (or tasks) to read, such as `[math, zh]`; everything if not given. Other
    texts are stored without tokens, and this teacher covers nothing of them."""
    long_text: LongText | None = None
    """What to do with a text that exceeds the context length; `extraction.long_text` if not
    given."""
    max_length: Positive | None = None
    """Lower the context length to this many tokens; `extraction.max_length` if not given."""
    layers: tuple[NonNegative, ...] | None = None
    """Layers to store; all of them if not given."""
    heads: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None
    """Key/value heads to store of every layer; all of them if not given."""
    eviction: StoredEviction | None = None
    """Store a subset of the tokens. All of them if not given; evict while streaming instead."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher's forward pass. `auto`: that of the store where it has the teacher;
    else bfloat16 on a GPU that computes in it, and float32 elsewhere."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention kernel of the forward pass; models without `sdpa` fall back to `eager`."""
    device_map: Literal["auto"] | None = None
    """`auto`: shard a model that does not fit on one GPU over all visible GPUs, by layers."""
    tp_plan: Literal["auto"] | None = None
    """`auto`: shard it over the GPUs of the processes that torchrun starts, within layers; all of
    them compute at once (tensor parallelism)."""
    codec: CodecSpec | None = None
    """Codecs of keys and values; `extraction.codec` if not given."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.chat and self.template is not None:
            raise ValueError("give `template` or `chat`, not both")
        for name in ("system", "template_date"):
            if getattr(self, name) is not None and not self.chat:
                raise ValueError(f"`{name}` needs `chat: true`")
        if self.stream == "decoder" and (self.chat or self.template is not None):
            raise ValueError("stream `decoder` takes neither `template` nor `chat`")
        if self.weights == "random" and (self.gguf_file is not None or self.device_map is not None):
            raise ValueError("`weights: random` takes neither `gguf_file` nor `device_map`")
        taken = [x for x in ("device_map", "gguf_file", "generate") if getattr(self, x) is not None]
        if self.tp_plan is not None and (taken or self.weights == "random"):
            raise ValueError(f"`tp_plan` does not go with `{[*taken, 'weights: random'][0]}`")
        if self.generate is not None and self.stream is not None:
            raise ValueError("`generate` is for decoder-only models; it does not go with `stream`")
        return self


class ExtractionConfig(Section):
    """Stage 1: reading the teachers into the store."""

    backend: Backend = "zarr"
    """`zarr`: compressed, for disks and shared file systems. `safetensors`: fastest to read."""
    codec: CodecSpec = CodecSpec()
    """Codecs of keys and values."""
    batch_tokens: Positive = 4096
    """Tokens per forward pass, padding included; halved automatically when memory runs out."""
    long_text: LongText = "error"
    """What to do with a text that exceeds the teacher's context length. `window`: read it in
    overlapping windows."""
    window_overlap: NonNegative = 128
    """Tokens that neighbouring windows share: the least context of a token inside the text."""
    max_length: Positive | None = None
    """Lower the context length to this many tokens."""
    importance: bool = True
    """Store the attention that every token receives from the answer; evictions rank by it."""
    hidden_at_cue: bool = False
    """Store the hidden states of every layer at the token before the answer, for `losses.codi`."""
    summaries: bool = False
    """Store mean and first hidden state of every sample, and the prototypes that
    `fusion.method: similarity` compares them with."""
    prototypes: Positive = 8
    """Number of k-means prototypes per teacher, with `summaries`."""
    confidence: bool = False
    """Store the teacher's negative log-likelihood of every token and the entropy of its prediction,
    4 bytes a token; encoders have none. `fusion.method: confidence` needs it."""
    logits: NonNegative = 0
    """Number of most likely tokens to store with their log-probabilities in place of every token,
    6 bytes each, and the log of the others' mass."""
    hidden: bool = False
    """Store the output of every kept layer at every token, for `losses.hidden`; `codec.hidden` is
    its codec."""
    writers: Positive = 1
    """Background threads that compress and write finished shards."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""

    @property
    def stores_predictions(self) -> bool:
        """Whether anything is stored of what a teacher predicts."""
        return self.confidence or self.logits > 0
