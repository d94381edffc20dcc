"""A teacher in memory: loaded, its adapter verified, its geometry measured.

Everything that the manifest says about a teacher is read off the loaded model, not off its
config: heads, dims, rotations and score scales come from the verification run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from kvdistill import provenance
from kvdistill.attention.adapters import Adapter
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.hooks import OnLayer, Site, capture
from kvdistill.attention.verification import CACHE, Verified, fit_adapter, forward_through_cache
from kvdistill.config.experiment import Experiment
from kvdistill.config.extraction import ExtractionConfig, GenerateConfig, TeacherConfig
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.batches import TeacherBatch
from kvdistill.extract.generate import with_own_rationales
from kvdistill.extract.loading import (
    load_teacher_model,
    load_teacher_tokenizer,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from kvdistill.extract.prompt_template import SEGMENTS, chat_template, parse_template
from kvdistill.extract.streams import forward, read_pair
from kvdistill.extract.teacher_tokens import Bos, Encoded, Reader
from kvdistill.store.manifest import TeacherManifest
from kvdistill.types import LayerGroup


@dataclass(frozen=True, eq=False)
class Teacher:
    """A loaded model, what is read from it, and how it is described in the store."""

    model: Any
    reader: Reader
    sites: tuple[Site, ...]
    layers: tuple[VerifiedLayer, ...]
    manifest: TeacherManifest
    max_length: int | None
    """Most tokens of a text: the model's positions, or the config's limit if that is less."""
    writer: Any = None
    """The model with its head, where it writes its own rationales."""
    generate: GenerateConfig | None = None

    @property
    def tokenizer(self) -> Any:
        """The fast tokenizer."""
        return self.reader.tokenizer

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return _input_device(self.model)

    def read(self, samples: Sequence[Sample], max_length: int | None = None) -> list[Encoded]:
        """Tokens of samples as this teacher reads them, truncated to ``max_length`` if given.

        Raises:
            TeacherError: the view does not fit a sample, or offsets are wrong; names the sample.
        """
        if self.manifest.stream == "decoder":
            return read_pair(self.reader, self.model, samples, max_length)
        return self.reader.read(samples, max_length)

    def own_texts(self, samples: Sequence[Sample], batch_tokens: int) -> list[Sample] | None:
        """The samples with this teacher's own rationales, where it writes them.

        Raises:
            TeacherError: a sample has no prompt to continue.
        """
        if self.generate is None:
            return None
        return with_own_rationales(
            self.writer,
            self.reader,
            samples,
            self.generate,
            batch_tokens=batch_tokens,
            max_length=self.max_length,
        )

    def run(self, batch: TeacherBatch, on_layer: OnLayer) -> Tensor:
        """A forward pass that hands ``on_layer`` every kept layer's Q, K and V."""
        if self.manifest.adapter == CACHE.name:
            inputs = (batch.input_ids, batch.attention_mask)
            return forward_through_cache(self.model, *inputs, self.layers, on_layer)
        with capture(self.sites, on_layer):
            return self.forward(batch)

    @torch.inference_mode()
    def forward(self, batch: TeacherBatch) -> Tensor:
        """One pass over a right-padded batch; the final hidden state ``[B, T, E]``."""
        return forward(self.model, self.manifest.stream, batch)


def load_teacher(name: str, experiment: Experiment) -> Teacher:
    """Load a teacher, find and verify its adapter, and describe it.

    Raises:
        TeacherError: no such model, weights that are missing or not safe to read, a tokenizer
            without offsets, layers that do not exist, or an architecture that does not verify.
    """
    config = experiment.teachers[name]
    whole, missing = load_teacher_model(name, config, _device(experiment.extraction.device))
    model = whole if config.generate is None else whole.base_model
    reader = _reader(name, config, model)
    verified = fit_adapter(name, model, config.stream)
    chosen = _chosen_layers(name, config, verified.layers)
    layers = tuple(layer for layer in verified.layers if layer.layer_idx in chosen)
    found = tuple(site for site in verified.sites if site.layer_idx in chosen)
    manifest = describe_teacher(name, experiment, reader, Loaded(model, missing, verified, layers))
    limit = max_positions(model, experiment.extraction.max_length)
    writer = None if config.generate is None else whole
    return Teacher(model, reader, found, layers, manifest, limit, writer, config.generate)


def _reader(name: str, config: TeacherConfig, model: Any) -> Reader:
    tokenizer = load_teacher_tokenizer(name, config)
    view = (
        chat_template(tokenizer, config.system) if config.chat else parse_template(config.template)
    )
    if config.generate is not None and view.source is None:
        view = SEGMENTS
    needs_bos = model.config.model_type.startswith("gemma")
    bos: Bos = "add" if config.bos == "always" or needs_bos else "keep"
    if config.bos == "never":
        bos = "remove"
    return Reader(tokenizer, view, add_special_tokens=not config.chat, bos=bos)


def _input_device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _chosen_layers(name: str, config: TeacherConfig, layers: Sequence[VerifiedLayer]) -> set[int]:
    available = {layer.layer_idx for layer in layers}
    if config.layers is None:
        return available
    unknown = sorted(set(config.layers) - available)
    if unknown:
        raise TeacherError(
            f"teacher {name!r} has no attention layer {unknown}; it has {sorted(available)}; "
            f"change teachers.{name}.layers"
        )
    return set(config.layers)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


PositionEncoding = Literal["rotary", "absolute", "relative", "none"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, the parameters its checkpoint lacks, and the layers of it that are kept."""

    model: Any
    missing: set[str]
    verified: Verified
    layers: tuple[VerifiedLayer, ...]


def describe_teacher(
    name: str, experiment: Experiment, reader: Reader, loaded: Loaded
) -> TeacherManifest:
    """The manifest of a teacher.

    Raises:
        TeacherError: something was asked for that this kind of teacher does not have.
    """
    model, verified, layers = loaded.model, loaded.verified, loaded.layers
    config, extraction, adapter = experiment.teachers[name], experiment.extraction, verified.adapter
    cross = adapter.stream == "cross"
    _refuse_what_is_not_there(name, extraction, model, verified)
    _refuse_what_cannot_be_kept(name, config, adapter, layers)
    return TeacherManifest(
        name=name,
        model=config.model,
        revision=config.revision,
        model_type=model.config.model_type,
        kind=adapter.kind,
        stream=adapter.stream,
        weights_fingerprint=weights_fingerprint(model, loaded.missing),
        tokenizer_fingerprint=tokenizer_fingerprint(reader.tokenizer),
        template=reader.view.source,
        extraction_fingerprint=experiment.extraction_fingerprint(name),
        versions=provenance.versions(),
        dtype=config.dtype,
        attn_implementation=model.config._attn_implementation,
        backend=extraction.backend,
        codec=experiment.codec(name),
        groups=_layer_groups(layers, config.heads),
        kept_heads=config.heads,
        eviction=config.eviction,
        skipped_layers=verified.skipped,
        position_encoding=_position_encoding(model, verified.layers),
        rotary={layer.layer_idx: layer.rotary for layer in layers if layer.rotary is not None},
        key_norm=adapter.key_norm,
        hidden_size=model.config.get_text_config().hidden_size,
        has_importance=extraction.importance and not cross,
        has_hidden_at_cue=extraction.hidden_at_cue,
        has_summaries=extraction.summaries,
        own_text=config.generate is not None,
        adapter=adapter.name,
        adapter_error=max(layer.error for layer in verified.layers),
    )


def _refuse_what_is_not_there(
    name: str, extraction: ExtractionConfig, model: Any, verified: Verified
) -> None:
    if verified.adapter.stream == "cross" and extraction.hidden_at_cue:
        raise TeacherError(
            f"teacher {name!r}: extraction.hidden_at_cue does not apply to stream cross, whose "
            "tokens are the encoder's; leave it off, or read stream encoder or decoder"
        )
    if not verified.sites and (extraction.importance or extraction.hidden_at_cue):
        raise TeacherError(
            f"teacher {name!r}: no adapter fits {type(model).__name__}, so it is read from its "
            "cache, which has no queries and no hidden states; set extraction.importance and "
            "extraction.hidden_at_cue to false, or write an adapter "
            "(kvdistill/attention/adapters.py)"
        )


def _refuse_what_cannot_be_kept(
    name: str, config: TeacherConfig, adapter: Adapter, layers: Sequence[VerifiedLayer]
) -> None:
    for layer in layers:
        unknown = sorted(set(config.heads or ()) - set(range(layer.num_key_value_heads)))
        if unknown:
            raise TeacherError(
                f"teacher {name!r}, layer {layer.layer_idx} has no key/value head {unknown}; it "
                f"has {layer.num_key_value_heads}; change teachers.{name}.heads"
            )
    if config.eviction is not None and adapter.stream == "cross" and config.eviction.ranks:
        raise TeacherError(
            f"teacher {name!r}: eviction {config.eviction.method} ranks by attention, which "
            "stream cross does not have; use right_crop, uniform or random"
        )


def _layer_groups(
    layers: Sequence[VerifiedLayer], heads: Sequence[int] | None
) -> tuple[LayerGroup, ...]:
    def geometry(layer: VerifiedLayer) -> tuple[int, int, int]:
        num_heads = layer.num_key_value_heads if heads is None else len(heads)
        return num_heads, layer.key_head_dim, layer.value_head_dim

    ordered = sorted(layers, key=lambda layer: (geometry(layer), layer.layer_idx))
    groups = (
        LayerGroup(tuple(layer.layer_idx for layer in members), *shape)
        for shape, members in groupby(ordered, geometry)
    )
    return tuple(sorted(groups, key=lambda group: group.layers))


def _position_encoding(model: Any, layers: Sequence[VerifiedLayer]) -> PositionEncoding:
    if any(layer.rotary is not None for layer in layers):
        return "rotary"
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if names & {"wpe", "position_embeddings", "embed_positions", "embed_position"}:
        return "absolute"
    config = model.config.get_text_config()
    relative = "relative_attention_bias" in names or getattr(config, "alibi", False)
    return "relative" if relative else "none"


def max_positions(model: Any, limit: int | None) -> int | None:
    """Most tokens of a text: the model's positions, or the limit if that is less."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    table = next(
        (m for n, m in model.named_modules() if n.endswith("embeddings.position_embeddings")), None
    )
    if positions and table is not None and table.padding_idx is not None:
        positions -= table.padding_idx + 1  # RoBERTa counts positions from after the padding's
    known = [length for length in (positions, limit) if length]
    return min(known, default=None)


# MERGED-DOC extract.describe
# What a store says about a teacher, read off the loaded and verified model.
