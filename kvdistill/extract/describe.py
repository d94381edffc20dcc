"""What a store says about a teacher, read off the loaded and verified model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from kvdistill import provenance
from kvdistill.adapters import Adapter
from kvdistill.config import Experiment, ExtractionConfig, TeacherConfig
from kvdistill.errors import TeacherError
from kvdistill.extract.capture import Site
from kvdistill.extract.fingerprints import tokenizer_fingerprint, weights_fingerprint
from kvdistill.extract.text import Reader
from kvdistill.extract.verify import VerifiedLayer
from kvdistill.store.manifest import TeacherManifest
from kvdistill.types import LayerGroup

PositionEncoding = Literal["rotary", "absolute", "relative", "none"]


@dataclass(frozen=True, eq=False)
class Verified:
    """The adapter that fits a model, and what was measured with it."""

    adapter: Adapter
    sites: list[Site]
    skipped: dict[int, str]
    layers: list[VerifiedLayer]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, the parameters its checkpoint lacks, and the layers of it that are kept."""

    model: Any
    missing: set[str]
    verified: Verified
    layers: tuple[VerifiedLayer, ...]


def describe(name: str, experiment: Experiment, reader: Reader, loaded: Loaded) -> TeacherManifest:
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
        groups=_groups(layers, config.heads),
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
            "extraction.hidden_at_cue to false, or write an adapter (kvdistill/adapters.py)"
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


def _groups(layers: Sequence[VerifiedLayer], heads: Sequence[int] | None) -> tuple[LayerGroup, ...]:
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


def max_length(model: Any, limit: int | None) -> int | None:
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
