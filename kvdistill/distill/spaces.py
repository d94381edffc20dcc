"""What training needs to know of a teacher, read from its store and from nowhere else.

A teacher whose layers differ in heads or dims is stored in groups of equal geometry; each group
serves the student layers that map to it. Most teachers have one group that serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.config_distill import FusionConfig
from kvdistill.distill.alignment import LayerMap, by_group
from kvdistill.distill.projection import ChannelStatistics, HeadShape
from kvdistill.errors import ConfigError
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.prototypes import read_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.schema import group_prefix
from kvdistill.types import KINDS, CodecSpec, Kind, TimeMethod


@dataclass(frozen=True, eq=False)
class GroupSpace:
    """Stored layers of one geometry, and the student layers that learn from them."""

    prefix: str
    """Of the group's arrays in a shard: empty, or ``g0/`` …"""
    student_layers: tuple[int, ...]
    layer_map: LayerMap
    """One entry per ``student_layers``."""
    shapes: Mapping[Kind, HeadShape]
    statistics: Mapping[Kind, ChannelStatistics]
    """Per kind, ``[L, H, D]`` over ``layer_map.needed``."""


@dataclass(frozen=True, eq=False)
class TeacherSpace:
    """One teacher as the distiller sees it."""

    name: str
    codec: CodecSpec
    groups: tuple[GroupSpace, ...]
    causal: bool
    """False where a token's KV has read the text after it (encoders)."""
    prototypes_KE: Tensor | None = None
    """In the teacher's own hidden space, for fusion by similarity."""

    @property
    def needed(self) -> tuple[int, ...]:
        """Teacher layers that must be read, ascending."""
        return tuple(sorted(layer for g in self.groups for layer in g.layer_map.needed))

    @property
    def depths(self) -> list[float]:
        """The real-valued teacher layer of every student layer, in order."""
        found: dict[int, float] = {}
        for group in self.groups:
            m = group.layer_map
            rows = zip(group.student_layers, m.lower, m.upper, m.fraction, strict=True)
            found |= {layer: low + part * (up - low) for layer, low, up, part in rows}
        return [found[layer] for layer in sorted(found)]


def teacher_space(
    store: KVStore, name: str, mapping: LayerMap, fusion: FusionConfig
) -> TeacherSpace:
    """Shapes, statistics and prototypes of one stored teacher under a layer map.

    Raises:
        ShardNotFound: fusion by similarity, but the teacher has no prototypes.
    """
    manifest = store.teacher(name)
    stored = store.statistics(name)
    groups = []
    for part in by_group(mapping, manifest.groups):
        group = manifest.groups[part.group_idx]
        prefix = group_prefix(manifest, part.group_idx)
        rows = [group.layers.index(layer) for layer in part.mapping.needed]
        heads = group.num_key_value_heads
        shapes = {kind: HeadShape(heads, group.head_dim(kind)) for kind in KINDS}
        statistics = {
            kind: ChannelStatistics(
                torch.from_numpy(stored[f"{prefix}{kind}"].mean[rows]),
                torch.from_numpy(stored[f"{prefix}{kind}"].variance[rows]),
            )
            for kind in KINDS
        }
        groups.append(GroupSpace(prefix, part.student_layers, part.mapping, shapes, statistics))
    prototypes = None
    if fusion.method == "similarity":
        found = read_prototypes(store, name)[fusion.prototypes]
        prototypes = torch.from_numpy(found).reshape(-1, found.shape[-1])
    return TeacherSpace(name, manifest.codec, tuple(groups), _is_causal(manifest), prototypes)


def check_alignment(manifest: TeacherManifest, time: TimeMethod) -> None:
    """Refuse an alignment in time that a teacher's shards have no places for.

    Raises:
        ConfigError: it kept other tokens in every head, or wrote another text than the student's.
    """
    name, eviction = manifest.name, manifest.eviction
    if eviction is not None and time != "latent":
        raise ConfigError(
            f"teacher {name!r} was extracted with eviction {eviction.method} to {eviction.budget} "
            f"tokens, other ones in every layer and head, so alignment.time {time} cannot place "
            "them; set it to latent, or extract the teacher without `eviction` under another name"
        )
    if manifest.own_text and time == "tokens":
        raise ConfigError(
            f"teacher {name!r} wrote its own rationales, which share no characters with the "
            "corpus's; set alignment.time to segments"
        )


def _is_causal(manifest: TeacherManifest) -> bool:
    if manifest.stream == "self":
        return manifest.kind == "decoder"
    return manifest.stream == "decoder"
