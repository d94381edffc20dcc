"""Targets from stored codes: decoded, standardised, and placed on the student's layers and tokens.

``TeacherSpace`` is what training needs to know of a teacher, read from its store: shapes, layer
maps, statistics. ``TeacherHead`` holds, per teacher and kind, the way from codes to targets and the
learned maps between both spaces.

A teacher whose layers differ in heads or dims is stored in groups of equal geometry. Each group
serves the student layers that map to it; most teachers have one group that serves them all.

Targets are made one layer at a time. All layers at once would be several float32 copies of
everything that a teacher has in a batch; one layer's copies fit the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdistill.attention.eviction import Eviction
from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import FusionConfig, ProjectionConfig
from kvdistill.distill.align.band import Band
from kvdistill.distill.align.layers import LayerMap, by_group
from kvdistill.distill.align.vocabulary import Vocabulary
from kvdistill.distill.fuse.by_confidence import Likelihood, likelihood_of
from kvdistill.distill.losses.fused_residual import FusedResidual
from kvdistill.distill.losses.regression import Regression
from kvdistill.distill.project.projections import StudentToTeacher, make_projection
from kvdistill.errors import ConfigError
from kvdistill.store.codecs import Transforms, by_layer, codec_of
from kvdistill.store.format import group_prefix
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.prototypes import teacher_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS, CodecSpec, Kind, TimeMethod

MIN_RELATIVE_STD = 1e-2
"""Lower bound on a channel's std, as a share of its layer's mean std: dividing a nearly constant
channel by its own std would turn its quantisation noise into a target like any other."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""Per group prefix, codes and scales ``[B, L, H, T or blocks, width]`` by suffix."""

TargetOf = Callable[[int], Tensor]
"""Row of a group's student layers → target ``[B, H_t, T, D_t]``."""


@dataclass(frozen=True)
class TargetStatistics:
    """Mean and variance per layer, head and channel of one teacher and kind: ``[L, H, D]``."""

    mean_LHD: Tensor
    variance_LHD: Tensor


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
    transforms: Transforms = field(default_factory=dict)
    """Codecs of ``layer_map.needed``, where they are ``klt``."""


@dataclass(frozen=True, eq=False)
class TeacherSpace:
    """Geometry, layer maps and statistics of one teacher."""

    name: str
    codec: CodecSpec
    groups: tuple[GroupSpace, ...]
    causal: bool
    """False where a token's KV depends on the text after it (encoders)."""
    prototypes_KE: Tensor | None = None
    """In the teacher's own hidden space, for fusion by similarity."""
    likelihood: Likelihood | None = None
    """For fusion by confidence, of a teacher that predicts text."""
    vocabulary: Vocabulary | None = None
    """For ``losses.logits``, of a teacher that predicts text."""

    @property
    def needed(self) -> tuple[int, ...]:
        """Teacher layers that must be read, ascending."""
        return tuple(sorted(layer for g in self.groups for layer in g.layer_map.needed))

    @property
    def depths(self) -> list[float]:
        """The real-valued teacher layer of every student layer, in order."""
        found: dict[int, float] = {}
        for group in self.groups:
            found |= zip(group.student_layers, group.layer_map.depths, strict=True)
        return [found[layer] for layer in sorted(found)]


def teacher_space(
    store: KVStore,
    name: str,
    mapping: LayerMap,
    fusion: FusionConfig,
    num_prototypes: int = 8,
    *,
    kinds: Sequence[Kind] = KINDS,
) -> TeacherSpace:
    """Shapes, statistics and prototypes of one stored teacher under a layer map.

    Raises:
        ShardNotFound: fusion by similarity, but the teacher has no summaries.
        ConfigError: fusion by confidence, but it has none.
    """
    manifest = store.teacher(name)
    stored = store.statistics(name)
    groups = []
    for group_idx, student_layers, part in by_group(mapping, manifest.groups):
        group, prefix = manifest.groups[group_idx], group_prefix(manifest, group_idx)
        rows = [group.layers.index(layer) for layer in part.needed]
        shapes = {kind: HeadShape(*manifest.shape(group, kind)) for kind in kinds}
        statistics = {
            kind: TargetStatistics(
                torch.from_numpy(stored[f"{prefix}{kind}"].mean[rows]),
                torch.from_numpy(stored[f"{prefix}{kind}"].variance[rows]),
            )
            for kind in kinds
        }
        transforms = {
            stem: codec.select(part.needed)
            for stem, codec in store.transforms(name).items()
            if set(part.needed) <= set(codec.layers)
        }
        groups.append(GroupSpace(prefix, student_layers, part, shapes, statistics, transforms))
    prototypes = None
    if fusion.method == "similarity":
        found = teacher_prototypes(store, name, num_prototypes)[fusion.prototypes]
        prototypes = torch.from_numpy(found).reshape(-1, found.shape[-1])
    stack = manifest.kind if manifest.stream == "self" else manifest.stream
    likelihood = likelihood_of(manifest, fusion) if fusion.method == "confidence" else None
    causal = stack == "decoder"
    return TeacherSpace(name, manifest.codec, tuple(groups), causal, prototypes, likelihood)


def check_alignment(manifest: TeacherManifest, time: TimeMethod) -> None:
    """Refuse an alignment in time that a teacher's shards cannot support.

    Raises:
        ConfigError: other tokens were kept in every head, or the text is not the student's.
    """
    name, eviction = manifest.name, manifest.eviction
    if eviction is not None and time != "latent":
        raise ConfigError(
            f"alignment.time {time}: teacher {name!r} was extracted with eviction "
            f"{eviction.method} to {eviction.budget} tokens, which differ between layers and "
            "heads; set it to latent, or extract the teacher without `eviction` under another name"
        )
    if manifest.own_text and time == "tokens":
        raise ConfigError(
            f"alignment.time tokens: teacher {name!r} generated its own rationales, which share "
            "no characters with the corpus; set it to segments"
        )


class Standardise(nn.Module):
    """``(x − mean) / std`` per layer, head and channel, with fixed statistics of the store.

    In raw KV a few channels carry most of the energy and layers differ by orders of magnitude, so
    an MSE learns those and little else. Statistics are over the whole corpus: the same for every
    batch, rank and run.
    """

    mean_LHD: Tensor
    scale_LHD: Tensor

    def __init__(self, statistics: TargetStatistics) -> None:
        super().__init__()
        self.register_buffer("mean_LHD", statistics.mean_LHD.float())
        self.register_buffer("scale_LHD", _inverse_std(statistics.variance_LHD))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H, T, D]`` to the same, standardised; a constant layer becomes zero."""
        return (x_BLHTD - self.mean_LHD[:, :, None]) * self.scale_LHD[:, :, None]

    def layer(self, x_BHTD: Tensor, row: int) -> Tensor:
        """As ``forward`` for one of the layers, ``[B, H, T, D]``."""
        return (x_BHTD - self.mean_LHD[row, :, None]) * self.scale_LHD[row, :, None]

    def set_layer(self, row: int, mean: Tensor, variance: Tensor) -> None:
        """Replace one layer's statistics, ``[H·D]`` each."""
        shape = self.mean_LHD[row].shape
        self.mean_LHD[row] = mean.view(shape)
        self.scale_LHD[row] = _inverse_std(variance.view(1, *shape))[0]


def unmeasured(num_layers: int, shape: HeadShape) -> Standardise:
    """The identity, whose statistics are set layer by layer."""
    zeros = torch.zeros(num_layers, *shape)
    return Standardise(TargetStatistics(zeros, torch.ones_like(zeros)))


def _inverse_std(variance_LHD: Tensor) -> Tensor:
    """``1 / std`` in float32, bounded by ``MIN_RELATIVE_STD``; 0 in a constant layer."""
    std = variance_LHD.float().clamp_min(0).sqrt()
    floor = MIN_RELATIVE_STD * std.mean(dim=(-2, -1), keepdim=True)
    safe = torch.maximum(std, floor)
    return torch.where(safe > 0, 1 / safe.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


class BandProduct:
    """Product of a band with one layer's KV, set up once for all layers of a teacher.

    Every (sample, head, student position) is a bag of ``W`` rows of the KV, so the product is one
    weighted ``embedding_bag``: neither a dense ``T_s × T_t`` matrix nor ``W`` gathered copies exist
    (``benchmarks/align.py``).
    """

    def __init__(self, band: Band, num_heads: int, num_columns: int) -> None:
        b, num_rows, width = band.weight.shape
        columns = band.columns(num_columns)
        first_row = num_columns * torch.arange(b * num_heads, device=columns.device)
        index = columns.unsqueeze(1) + first_row.view(b, num_heads, 1, 1)
        self.shape = (b, num_heads, num_rows)
        self.index = index.reshape(-1, width)
        self.weight = band.weight.unsqueeze(1).expand(index.shape).reshape(-1, width)

    def __call__(self, x_BHTD: Tensor) -> Tensor:
        """``[B, H, T_t, D]``, finite (padding too), to ``[B, H, T_s, D]``; zero if not covered."""
        dim = x_BHTD.shape[-1]
        if 0 in x_BHTD.shape or 0 in self.shape:
            return x_BHTD.new_zeros(*self.shape, dim)
        weight = self.weight.to(x_BHTD.dtype)
        table = x_BHTD.reshape(-1, dim)
        out = F.embedding_bag(self.index, table, per_sample_weights=weight, mode="sum")
        return out.view(*self.shape, dim)


class TeacherHead(nn.Module):
    """One teacher and kind: codes to targets, and the maps between teacher and student.

    ``regress``  student to teacher, in mode ``student_to_teacher``
    ``project``  teacher to student (or to the shared space), where a loss needs it
    """

    def __init__(
        self,
        space: TeacherSpace,
        kind: Kind,
        student: HeadShape,
        projection: ProjectionConfig,
        projects: bool,
    ) -> None:
        super().__init__()
        self.kind, self.groups, self.is_fused = kind, space.groups, False
        self.codecs = [codec_of(space.codec, kind, g.transforms, g.prefix) for g in space.groups]
        raw = projection.mode == "identity"
        self.standardise = nn.ModuleList(
            nn.Identity() if raw else Standardise(g.statistics[kind]) for g in space.groups
        )
        self.regress = nn.ModuleList()
        self.project = nn.ModuleList()
        for group in space.groups:
            num_layers, shape = len(group.student_layers), group.shapes[kind]
            if projection.mode == "student_to_teacher":
                maps = num_layers, student, shape, projection.hidden
                self.regress.append(StudentToTeacher(*maps))
            if projects:
                self.project.append(make_projection(projection, num_layers, shape, student))
        if projection.mode == "frozen":
            self.project.requires_grad_(requires_grad=False)
        order = [layer for group in space.groups for layer in group.student_layers]
        self._order = [order.index(layer) for layer in sorted(order)]

    def layers(self, parts: Parts, band: Band) -> list[LayerTargets]:
        """Per group, targets that are made one layer at a time."""
        return [LayerTargets(self, i, parts, band) for i in range(len(self.groups))]

    @torch.no_grad()
    def kept(self, parts: Parts, evictions: list[Eviction]) -> list[Tensor]:
        """Per group, targets of the tokens that an eviction keeps: ``[B, L, H_t, M, D_t]``."""
        found = []
        for i, (group, eviction) in enumerate(zip(self.groups, evictions, strict=True)):
            kept_BLHMD = self.standardise[i](eviction.keep(self.decode(parts, group)))
            found.append(group.layer_map.apply(kept_BLHMD))
        return found

    def decode(self, parts: Parts, group: GroupSpace) -> Tensor:
        """One group's stored keys or values ``[B, L, H, T, D]`` float32, not standardised."""
        codec = self.codecs[self.groups.index(group)]
        return codec.decode(parts[group.prefix], self.kind)

    def regressions(
        self, targets: Sequence[TargetOf], alpha_BLT: Tensor, teacher: int = 0
    ) -> list[Regression]:
        """The terms of ``losses.regression_error``, one per group.

        Args:
            targets: per group, the target of a row of its student layers.
            alpha_BLT: this teacher's fusion weights, 0 where it does not count; L may be 1.
            teacher: its position among the teachers.
        """
        regress: Any = self.regress
        return [
            Regression(
                maps.weight_LIO, maps.bias_LO, group.student_layers, target, alpha_BLT, teacher,
                tuple(maps.hidden.values()),
                target.fused() if self.is_fused and isinstance(target, LayerTargets) else None,
            )
            for maps, group, target in zip(regress, self.groups, targets, strict=True)
        ]  # fmt: skip

    def predictions(self, student_BLHTD: Tensor) -> list[Tensor]:
        """Per group, the student's KV mapped to the teacher's space: ``[B, L, H_t, T, D_t]``."""
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


class LayerTargets:
    """Targets of one group, by row of its layer map; rows in order share what is placed.

    A band and a layer map act on different axes, so a stored layer is first brought to the
    student's tokens and then mixed with its neighbour.
    """

    def __init__(self, head: TeacherHead, group_idx: int, parts: Parts, band: Band) -> None:
        group = head.groups[group_idx]
        self._codec, self._kind, self._band = head.codecs[group_idx], head.kind, band
        self._parts, self._num_heads = parts[group.prefix], group.shapes[head.kind].num_heads
        self._standardise: Any = head.standardise[group_idx]
        self._mapping, self._stored = group.layer_map, group.layer_map.needed
        self._placed: dict[int, Tensor] = {}

    @cached_property
    def _decode_row(self) -> Callable[[int], Tensor]:
        return by_layer(self._codec, self._parts, self._kind)

    @cached_property
    def _product(self) -> BandProduct:
        return BandProduct(self._band, self._num_heads, self._parts[""].shape[3])

    def fused(self) -> FusedResidual:
        """What compares with these targets without making them, on a GPU."""
        statistics = self._standardise.mean_LHD, self._standardise.scale_LHD
        place: dict[str, Any] = {"band": self._band, "layers": self._mapping}
        return FusedResidual(self._codec, self._parts, self._kind, **place, statistics=statistics)

    @torch.no_grad()
    def __call__(self, row: int) -> Tensor:
        """The target of one student layer, ``[B, H_t, T_s, D_t]`` float32; do not modify it."""
        mapping = self._mapping
        lower, upper, fraction = mapping.lower[row], mapping.upper[row], mapping.fraction[row]
        wanted = (lower, upper) if fraction else (lower,)
        self._placed = {
            layer: self._placed[layer] if layer in self._placed else self._place(layer)
            for layer in wanted
        }
        if not fraction:
            return self._placed[lower]
        return torch.lerp(self._placed[lower], self._placed[upper], fraction)

    def __len__(self) -> int:
        """Student layers."""
        return len(self._mapping.lower)

    def __iter__(self) -> Iterator[Tensor]:
        """The targets of all student layers, one after the other."""
        return map(self, range(len(self)))

    def stacked(self) -> Tensor:
        """All student layers, ``[B, L, H_t, T_s, D_t]``."""
        return torch.stack([*self], dim=1)

    def _place(self, layer: int) -> Tensor:
        """A stored layer, decoded and standardised, on the student's tokens."""
        row = self._stored.index(layer)
        decoded_BHTD = self._decode_row(row)
        if not isinstance(self._standardise, nn.Identity):
            decoded_BHTD = self._standardise.layer(decoded_BHTD, row)
        return self._product(decoded_BHTD)
