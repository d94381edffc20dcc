"""The student, the projectors and the losses as one module: ``forward(batch) → losses``.

    codes → decode → standardise → map layers → align → project → fuse → errors

Two modes, in both of which the target cannot move towards the student (``docs/projection.md``):

``student_to_teacher``  the student's KV is regressed onto each teacher's standardised KV;
                        the teachers' errors are mixed by the fusion weights
``frozen``              a fixed projector brings each teacher into the student's space, the
                        projected teachers are fused, and the student's KV is compared with that
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdistill.config import FusionConfig, LossConfig, ProjectionConfig
from kvdistill.distill.alignment import Band, LayerMap, apply_band
from kvdistill.distill.data.collate import IGNORED_LABEL, Batch
from kvdistill.distill.fusion import fixed_weights, fuse, renormalise
from kvdistill.distill.losses import cosine_error, kv_error, reduce_tokens
from kvdistill.distill.projection import (
    ChannelStatistics,
    HeadShape,
    LinearProjection,
    Standardise,
    StudentToTeacher,
)
from kvdistill.distill.student import KVCapture
from kvdistill.store.codecs import CODECS
from kvdistill.store.manifest import CodecSpec
from kvdistill.types import KINDS, Kind


@dataclass(frozen=True, eq=False)
class TeacherSpace:
    """What the distiller knows of one teacher; all of it comes from the store."""

    name: str
    layer_map: LayerMap
    codec: CodecSpec
    shapes: Mapping[Kind, HeadShape]
    statistics: Mapping[Kind, ChannelStatistics]
    """Per kind, ``[L, H, D]`` over the layers of ``layer_map.needed``."""


class TeacherHead(nn.Module):
    """One teacher, one kind: from stored codes to a standardised target, and the projector."""

    def __init__(self, teacher: TeacherSpace, kind: Kind, student: HeadShape, mode: str) -> None:
        super().__init__()
        self.kind, self.layer_map = kind, teacher.layer_map
        self.codec = CODECS[teacher.codec.key if kind == "key" else teacher.codec.value]
        statistics = teacher.statistics[kind]
        self.standardise = Standardise(statistics)
        num_layers, shape = len(self.layer_map.lower), teacher.shapes[kind]
        self.projector: nn.Module
        if mode == "student_to_teacher":
            self.projector = StudentToTeacher(num_layers, student, shape)
        else:
            self.projector = LinearProjection(num_layers, shape, student).requires_grad_(False)

    def target(self, parts: Mapping[str, Tensor], band: Band) -> Tensor:
        """Standardised teacher KV at the student's places: ``[B, L_s, H_t, T_s, D_t]``."""
        teacher_BLHTD = self.standardise(self.codec.decode(parts, self.kind))
        # Both maps are linear and commute; layers first, since fewer layers are then aligned.
        mapped_BLHTD = self.layer_map.apply(teacher_BLHTD, self.layer_map.needed)
        return apply_band(band, mapped_BLHTD)


class Distiller(nn.Module):
    """Student, projectors and losses. The student alone is what gets saved as a model."""

    def __init__(
        self,
        student: Any,
        teachers: list[TeacherSpace],
        projection: ProjectionConfig,
        fusion: FusionConfig,
        losses: LossConfig,
    ) -> None:
        super().__init__()
        self.student = student
        self.capture = KVCapture(student)
        self.projection, self.losses = projection, losses
        heads = self.capture.geometry.heads
        self.heads = nn.ModuleDict(
            {
                _module_name(teacher.name): nn.ModuleDict(
                    {kind: TeacherHead(teacher, kind, heads, projection.mode) for kind in KINDS}
                )
                for teacher in teachers
            }
        )
        self.teacher_names = [teacher.name for teacher in teachers]
        weights = fusion.weights or dict.fromkeys(self.teacher_names, 1.0)
        if teachers:
            alpha = fixed_weights([weights[name] for name in self.teacher_names])
            self.register_buffer("alpha_NBLT", alpha)

    def forward(
        self, batch: Batch, num_labels: Tensor | None = None, num_covered: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch: float32 scalars by name, and their weighted sum as ``loss``.

        Args:
            batch: as ``Collate`` makes it, on the student's device.
            num_labels: predicted tokens of all micro-batches and ranks; this batch's if None.
            num_covered: tokens that some teacher covers, likewise.
        """
        logits, student = self.student_kv(batch)
        parts = {"cross_entropy": _cross_entropy(logits, batch["labels"], num_labels)}
        if self.teacher_names and self.losses.uses_teachers:
            maps, mask = self.kv_maps(student, batch["teachers"])
            parts |= {name: reduce_tokens(error, mask, num_covered) for name, error in maps.items()}
        weight = self.losses.model_dump()
        parts["loss"] = torch.stack([weight[name] * value for name, value in parts.items()]).sum()
        return parts

    def student_kv(self, batch: Batch) -> tuple[Tensor, dict[Kind, Tensor]]:
        """Logits ``[B, T, V]``, and the student's unrotated KV ``[B, L, H, T, D]`` per kind."""
        with self.capture() as captured:
            output = self.student(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
        stacked = {
            kind: torch.stack([layer[i] for layer in captured], dim=1)
            for i, kind in enumerate(KINDS)
        }
        return output.logits, stacked

    def targets(self, kind: Kind, teachers: Batch) -> list[Tensor]:
        """Every teacher's standardised target ``[B, L_s, H_t, T_s, D_t]``, without gradient."""
        with torch.no_grad():
            return [
                self._head(name, kind).target(teachers[name][kind], band_of(teachers[name]))
                for name in self.teacher_names
            ]

    def kv_maps(
        self, student: Mapping[Kind, Tensor], teachers: Batch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Errors per token ``[B, T]`` by loss name, and the mask of tokens that count."""
        alpha, covered_BT = self.weights(teachers)
        maps: dict[str, Tensor] = {}
        for kind in KINDS:
            pairs = self.pairs(student[kind], kind, teachers, alpha)
            error = sum(a * kv_error(s, t, self.losses.distance) for a, s, t in pairs)
            maps[kind] = torch.as_tensor(error)
            if self.losses.cosine:
                cosine = sum(a * cosine_error(s, t) for a, s, t in pairs)
                maps["cosine"] = maps.get("cosine", 0) + torch.as_tensor(cosine) / len(KINDS)
        return maps, covered_BT

    def weights(self, teachers: Batch) -> tuple[Tensor, Tensor]:
        """Fusion weights ``[N, B, L, T]``, and which tokens any teacher covers ``[B, T]``."""
        covered_NBT = torch.stack([teachers[name]["covered"] for name in self.teacher_names])
        return renormalise(self.get_buffer("alpha_NBLT"), covered_NBT), covered_NBT.any(0)

    def pairs(
        self, student_BLHTD: Tensor, kind: Kind, teachers: Batch, alpha: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(weight ``[B, T]``, student, target) of everything that is compared for one kind."""
        targets = self.targets(kind, teachers)
        if self.projection.mode == "student_to_teacher":
            return [
                (alpha[i, :, 0], self._head(name, kind).projector(student_BLHTD), targets[i])
                for i, name in enumerate(self.teacher_names)
            ]
        with torch.no_grad():
            projected = [
                self._head(name, kind).projector(target)
                for name, target in zip(self.teacher_names, targets, strict=True)
            ]
            fused = fuse(alpha, projected)
        return [(alpha.sum(0)[:, 0], student_BLHTD, fused)]

    def depths(self, name: str) -> list[float]:
        """The teacher's layer, as a real number, that each student layer is compared with."""
        mapping: LayerMap = self._head(name, "key").layer_map
        rows = zip(mapping.lower, mapping.upper, mapping.fraction, strict=True)
        return [low + part * (up - low) for low, up, part in rows]

    def _head(self, name: str, kind: Kind) -> Any:
        heads: Any = self.heads[_module_name(name)]
        return heads[kind]


def _cross_entropy(logits: Tensor, labels: Tensor, num_labels: Tensor | None) -> Tensor:
    targets = labels[:, 1:]
    errors = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        targets,
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return reduce_tokens(errors, targets != IGNORED_LABEL, num_labels)


def band_of(teacher: Batch) -> Band:
    """The alignment that a teacher's part of a batch carries."""
    return Band(teacher["start"], teacher["weight"], teacher["covered"])


def _module_name(teacher: str) -> str:
    """A teacher's name may hold dots, a module's name may not."""
    return teacher.replace(".", "·")
