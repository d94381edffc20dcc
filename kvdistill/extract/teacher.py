"""A teacher in memory: loaded, its adapter verified, its geometry measured.

Everything that the manifest says about a teacher is read off the loaded model, not off its
config: heads, dims, rotations and score scales come from the verification run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill import provenance
from kvdistill.config import Experiment, TeacherConfig
from kvdistill.errors import TeacherError
from kvdistill.extract.adapters import Adapter
from kvdistill.extract.capture import Site, sites
from kvdistill.extract.families import adapters_for
from kvdistill.extract.fingerprints import tokenizer_fingerprint, weights_fingerprint
from kvdistill.extract.loading import load_model, load_tokenizer
from kvdistill.extract.rotary import candidates
from kvdistill.extract.text import View
from kvdistill.extract.verify import VerifiedLayer, verify
from kvdistill.store.manifest import TeacherManifest
from kvdistill.types import LayerGroup

PROBE_TOKENS: Final = 13
"""Length of the verification run; prime, so that no axis is mistaken for the token axis."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A loaded model, what is read from it, and how it is described in the store."""

    model: Any
    tokenizer: Any
    view: View
    sites: tuple[Site, ...]
    layers: tuple[VerifiedLayer, ...]
    manifest: TeacherManifest
    max_length: int | None
    """Most tokens of a text: the model's positions, or the config's limit if that is less."""

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """One pass over right-padded ``[B, T]``, without a cache and without an LM head."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def load_teacher(name: str, experiment: Experiment) -> Teacher:
    """Load a teacher, find and verify its adapter, and describe it.

    Raises:
        TeacherError: no such model, weights that are missing or not safe to read, a tokenizer
            without offsets, layers that do not exist, or an architecture that does not verify.
    """
    config = experiment.teachers[name]
    device = _device(experiment.extraction.device)
    model, missing = load_model(name, config, device)
    tokenizer = load_tokenizer(name, config)
    adapter, found, skipped, layers = _verified(name, model)
    chosen = _chosen(name, config, layers)
    kept = tuple(site for site in found if site.layer_idx in chosen)
    max_length = _max_length(model, experiment.extraction.max_length)
    manifest = TeacherManifest(
        name=name,
        model=config.model,
        revision=config.revision,
        model_type=model.config.model_type,
        kind=adapter.kind,
        stream=adapter.stream,
        weights_fingerprint=weights_fingerprint(model, missing),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template=None,
        extraction_fingerprint=experiment.extraction_fingerprint(name),
        versions=provenance.versions(),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        backend=experiment.extraction.backend,
        codec=experiment.codec(name),
        groups=_groups([layer for layer in layers if layer.layer_idx in chosen]),
        skipped_layers=skipped,
        position_encoding=_position_encoding(model, layers),
        rotary={
            layer.layer_idx: layer.rotary
            for layer in layers
            if layer.rotary is not None and layer.layer_idx in chosen
        },
        key_norm=adapter.key_norm,
        hidden_size=model.config.get_text_config().hidden_size,
        adapter=adapter.name,
        adapter_error=max(layer.error for layer in layers),
    )
    kept_layers = tuple(layer for layer in layers if layer.layer_idx in chosen)
    return Teacher(model, tokenizer, View(), kept, kept_layers, manifest, max_length)


def _verified(
    name: str, model: Any
) -> tuple[Adapter, list[Site], dict[int, str], list[VerifiedLayer]]:
    problems: list[str] = []
    for adapter in adapters_for(name, model):
        try:
            found, skipped = sites(model, adapter)
            rotations = candidates(model, max(site.layer_idx for site in found) + 1)
            layers = verify(model, found, rotations, lambda: _probe(model))
        except TeacherError as error:
            problems.append(str(error))
            continue
        return adapter, found, skipped, layers
    raise TeacherError(f"teacher {name!r}: {problems[0]}")


@torch.inference_mode()
def _probe(model: Any) -> None:
    device = model.get_input_embeddings().weight.device
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _chosen(name: str, config: TeacherConfig, layers: list[VerifiedLayer]) -> set[int]:
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


def _groups(layers: list[VerifiedLayer]) -> tuple[LayerGroup, ...]:
    def geometry(layer: VerifiedLayer) -> tuple[int, int, int]:
        return layer.num_key_value_heads, layer.key_head_dim, layer.value_head_dim

    ordered = sorted(layers, key=lambda layer: (geometry(layer), layer.layer_idx))
    groups = (
        LayerGroup(tuple(layer.layer_idx for layer in members), *shape)
        for shape, members in groupby(ordered, geometry)
    )
    return tuple(sorted(groups, key=lambda group: group.layers))


def _position_encoding(model: Any, layers: list[VerifiedLayer]) -> Any:
    if any(layer.rotary is not None for layer in layers):
        return "rotary"
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if names & {"wpe", "position_embeddings", "embed_positions", "embed_position"}:
        return "absolute"
    config = model.config.get_text_config()
    relative = "relative_attention_bias" in names or getattr(config, "alibi", False)
    return "relative" if relative else "none"


def _max_length(model: Any, limit: int | None) -> int | None:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    table = next(
        (m for n, m in model.named_modules() if n.endswith("embeddings.position_embeddings")), None
    )
    if positions and table is not None and table.padding_idx is not None:
        positions -= table.padding_idx + 1  # RoBERTa counts positions from after the padding's
    known = [length for length in (positions, limit) if length]
    return min(known, default=None)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
