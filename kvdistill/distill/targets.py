"""What training needs to know of a teacher, read from its store and from nowhere else.

A teacher whose layers differ in heads or dims is stored in groups of equal geometry; each group
serves the student layers that map to it. Most teachers have one group that serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.attention.eviction import Eviction
from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import FusionConfig, ProjectionConfig
from kvdistill.distill.align.band import Bags, Band, bags_of
from kvdistill.distill.align.layers import LayerMap, by_group
from kvdistill.distill.losses.regression import Regression
from kvdistill.distill.project.projections import (
    BottleneckProjection,
    FullProjection,
    LinearProjection,
    SpaceAdapter,
    StudentToTeacher,
)
from kvdistill.distill.project.standardise import Standardise, TargetStatistics
from kvdistill.errors import ConfigError
from kvdistill.store.codecs import CODECS
from kvdistill.store.format import group_prefix
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.prototypes import read_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS, CodecSpec, Kind, ProjectionInit, TimeMethod


@dataclass(frozen=True, eq=False)
class GroupSpace:
    """Stored layers of one geometry, and the student layers that learn from them."""

    prefix: str
    """Of the group's arrays in a shard: empty, or ``g0/`` …"""
    student_layers: tuple[int, ...]
    layer_map: LayerMap
    """One entry per ``student_layers``."""
    shapes: Mapping[Kind, HeadShape]
    statistics: Mapping[Kind, TargetStatistics]
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
            kind: TargetStatistics(
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


Read = Callable[[Mapping[str, Tensor], int], Tensor]
"""Stored parts of one layer ``[B, H, T_t, …]``, and its row → standardised ``[B, H, T_t, D]``."""


class LayerTargets:
    """One group of one teacher and kind, called with rows of ``mapping``; cheapest in order."""

    def __init__(
        self, read: Read, parts: Mapping[str, Tensor], mapping: LayerMap, bags: Bags
    ) -> None:
        self._read, self._parts, self._mapping, self._bags = read, parts, mapping, bags
        self._stored = mapping.needed
        self._placed: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._mapping.lower)

    @torch.no_grad()
    def __call__(self, row: int) -> Tensor:
        """The target of one student layer, ``[B, H_t, T_s, D_t]`` float32; not to be changed."""
        lower, upper = self._mapping.lower[row], self._mapping.upper[row]
        fraction = self._mapping.fraction[row]
        wanted = (lower, upper) if fraction else (lower,)
        self._placed = {
            layer: self._placed[layer] if layer in self._placed else self._place(layer)
            for layer in wanted
        }
        if not fraction:
            return self._placed[lower]
        return torch.lerp(self._placed[lower], self._placed[upper], fraction)

    def whole(self) -> Tensor:
        """All student layers, ``[B, L, H_t, T_s, D_t]``."""
        return torch.stack([self(row) for row in range(len(self))], dim=1)

    def _place(self, layer: int) -> Tensor:
        row = self._stored.index(layer)
        parts = {suffix: x[:, row] for suffix, x in self._parts.items()}
        return self._bags.sum(self._read(parts, row))


Parts = Mapping[str, Mapping[str, Tensor]]
"""Per group prefix, codes and scales by suffix, as ``Collate`` pads them."""


TargetOf = Callable[[int], Tensor]
"""Row of a group's student layers → target ``[B, H_t, T, D_t]``."""


class TeacherHead(nn.Module):
    """Decodes and places one kind of one teacher's KV; regresses onto it or projects it.

    ``regress``  student to teacher, in mode ``student_to_teacher``
    ``project``  teacher to student (or to the shared space), where something needs it
    """

    def __init__(
        self,
        space: TeacherSpace,
        kind: Kind,
        student: HeadShape,
        projection: ProjectionConfig,
        *,
        projects: bool,
    ) -> None:
        super().__init__()
        self.kind, self.groups = kind, space.groups
        self.codec = CODECS[space.codec.key if kind == "key" else space.codec.value]
        raw = projection.mode == "identity"
        self.standardise = nn.ModuleList(
            nn.Identity() if raw else Standardise(g.statistics[kind]) for g in space.groups
        )
        self.regress = nn.ModuleList()
        self.project = nn.ModuleList()
        for group in space.groups:
            num_layers, shape = len(group.student_layers), group.shapes[kind]
            if projection.mode == "student_to_teacher":
                self.regress.append(StudentToTeacher(num_layers, student, shape))
            if projects:
                self.project.append(make_projection(projection, num_layers, shape, student))
        if projection.mode == "frozen":
            self.project.requires_grad_(requires_grad=False)
        order = [layer for group in space.groups for layer in group.student_layers]
        self._order = [order.index(layer) for layer in sorted(order)]

    def layers(self, parts: Parts, band: Band) -> list[LayerTargets]:
        """Standardised KV at the student's layers and tokens, layer by layer, of every group."""
        found = []
        for i, group in enumerate(self.groups):
            stored = parts[group.prefix]
            _, _, num_heads, num_columns, _ = stored[""].shape
            bags = bags_of(band, num_heads, num_columns)
            found.append(LayerTargets(self._reader(i), stored, group.layer_map, bags))
        return found

    def targets(self, parts: Parts, band: Band) -> list[Tensor]:
        """``layers``, all at once: per group ``[B, L, H_t, T, D_t]``."""
        return [layers.whole() for layers in self.layers(parts, band)]

    @torch.no_grad()
    def kept(self, parts: Parts, evictions: list[Eviction]) -> list[Tensor]:
        """As ``targets``, of the tokens that an eviction per group keeps: ``T`` is its ``M``."""
        found = []
        for i, (group, eviction) in enumerate(zip(self.groups, evictions, strict=True)):
            kept_BLHMD = self.standardise[i](eviction.keep(self.decode(parts, group)))
            found.append(group.layer_map.apply(kept_BLHMD, group.layer_map.needed))
        return found

    def decode(self, parts: Parts, group: GroupSpace) -> Tensor:
        """One group's stored keys or values ``[B, L, H, T, D]`` float32, not standardised."""
        return self.codec.decode(parts[group.prefix], self.kind)

    def _reader(self, group_idx: int) -> Read:
        standardise: Any = self.standardise[group_idx]

        def read(parts: Mapping[str, Tensor], row: int) -> Tensor:
            decoded_BHTD: Tensor = self.codec.decode(parts, self.kind)
            if isinstance(standardise, nn.Identity):
                return decoded_BHTD
            return standardise.layer(decoded_BHTD, row)  # type: ignore[no-any-return]

        return read

    def regressions(self, targets: Sequence[TargetOf], alpha_BLT: Tensor) -> list[Regression]:
        """What ``losses.regression_error`` sums up: one regression per group.

        Args:
            targets: per group, the target of a row of its student layers.
            alpha_BLT: this teacher's fusion weights; L may be 1.
        """
        return [
            Regression(maps.weight_LIO, maps.bias_LO, group.student_layers, target, alpha_BLT)
            for maps, group, target in zip(self._maps, self.groups, targets, strict=True)
        ]

    @property
    def _maps(self) -> list[StudentToTeacher]:
        return [maps for maps in self.regress if isinstance(maps, StudentToTeacher)]

    def guesses(self, student_BLHTD: Tensor) -> list[Tensor]:
        """The student's guess at ``targets``, group by group."""
        return [regress(self.of_group(student_BLHTD, i)) for i, regress in enumerate(self.regress)]

    def projected(self, targets: list[Tensor]) -> Tensor:
        """Targets in the student's (or the shared) space: ``[B, L_s, H, T, D]``."""
        parts = [project(x) for project, x in zip(self.project, targets, strict=True)]
        joined = torch.cat(parts, dim=1)
        return joined if len(parts) == 1 else joined[:, self._order]

    def of_group(self, student_BLHTD: Tensor, group_idx: int) -> Tensor:
        """The student layers that one group serves."""
        if len(self.groups) == 1:
            return student_BLHTD
        return student_BLHTD[:, list(self.groups[group_idx].student_layers)]


def make_projection(
    config: ProjectionConfig, num_layers: int, source: HeadShape, student: HeadShape
) -> Any:
    """A teacher-to-student map as the config says, or a teacher's adapter to the shared space."""
    if config.mode == "identity":
        if source != student:
            raise ConfigError(
                f"projection.mode identity: the teacher has {source.num_heads} KV heads of "
                f"{source.head_dim}, the student {student.num_heads} of {student.head_dim}; they "
                "must agree, or use student_to_teacher"
            )
        return nn.Identity()
    if config.mode == "shared_space":
        return SpaceAdapter(num_layers, source, HeadShape(config.space_heads, config.space_dim))
    if config.method == "bottleneck":
        return BottleneckProjection(num_layers, source, student, config.mlp_ratio)
    kind = FullProjection if config.method == "full" else LinearProjection
    init: ProjectionInit = "orthogonal" if config.init == "orthogonal" else "grouped_mean"
    return kind(num_layers, source, student, init)


# MERGED-DOC distill.layer_targets
# A teacher's standardised KV at the student's layers and tokens, one layer at a time.
#
# All layers at once would be several float32 copies of everything that a teacher has at a batch
# (decoded, standardised, placed); one layer's stay in the processor's cache, and their memory is
# used again for the next. A band and a layer map act on different axes, so a stored layer is
# brought
# to the student's tokens once and then mixed with its neighbour.


# MERGED-DOC distill.head
# One teacher, one kind: from stored codes to a target, and the maps between both spaces.
