"""Teachers, and what stage 1 keeps of them, as settings."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config.base import NonNegativeFloat, Positive, Section
from kvdistill.types import Backend, CodecSpec, StoredEviction


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
