"""One teacher, one kind: from stored codes to a target, and the maps between both spaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.config_distill import ProjectionConfig
from kvdistill.distill.alignment import Band, bags_of
from kvdistill.distill.layer_targets import LayerTargets, Read
from kvdistill.distill.losses import Regression
from kvdistill.distill.projection import (
    BottleneckProjection,
    FullProjection,
    HeadShape,
    LinearProjection,
    SpaceAdapter,
    Standardise,
    StudentToTeacher,
)
from kvdistill.distill.spaces import GroupSpace, TeacherSpace
from kvdistill.errors import ConfigError
from kvdistill.eviction import Eviction
from kvdistill.store.codecs import CODECS
from kvdistill.types import Kind, ProjectionInit

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
