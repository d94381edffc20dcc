"""Student, projectors and losses as one module: ``forward(batch) → losses``.

    codes → decode → standardise → place (layers, tokens) → project → fuse → errors

Where the target comes from, and what may move it (``docs/projection.md``):

``student_to_teacher``  the student's KV is regressed onto each teacher's standardised KV; the
                        teachers' errors are mixed by the fusion weights. Nothing moves the target
``frozen``              a fixed projector maps teachers into the student's space, where they are
                        fused. Nothing moves the target
``task``                the projector learns from ``inject`` alone; the K/V loss sees its output
                        detached
``joint``               the projector learns from the K/V loss too, and can absorb it
``shared_space``        every teacher and the student map into one space; targets are detached
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.distill import AlignmentConfig, FusionConfig, LossConfig, ProjectionConfig
from kvdistill.distill.align.band import band_of
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.fuse.fusion_weights import FusionWeights
from kvdistill.distill.fuse.weights import entropy, fuse, mean_weights, renormalise
from kvdistill.distill.kv_losses import fused_errors, teacher_errors
from kvdistill.distill.losses.absorption import target_variance
from kvdistill.distill.losses.attention_maps import AttentionMaps
from kvdistill.distill.losses.pointwise import cross_entropy, num_predicted
from kvdistill.distill.losses.regression import regression_error
from kvdistill.distill.losses.weighting import num_covered, reduce_tokens, weighted_sum
from kvdistill.distill.project.projections import SpaceAdapter
from kvdistill.distill.student.injection import InjectionGate, injecting
from kvdistill.distill.targets import LayerTargets, TargetOf, TeacherHead, TeacherSpace
from kvdistill.errors import ConfigError
from kvdistill.types import KINDS, Kind

Counts = Mapping[str, Tensor]
"""Tokens that losses are divided by, over all micro-batches and ranks of a step."""

Targets = Mapping[Kind, list[list[Tensor]]]
"""Per kind, teacher and group: the standardised target ``[B, L, H_t, T, D_t]``."""


@dataclass(frozen=True, eq=False)
class StudentOutput:
    """One forward pass of the student; keys and queries are not rotated."""

    logits: Tensor
    query_BLQTD: Tensor
    key_BLHTD: Tensor
    value_BLHTD: Tensor
    hidden: Tensor | None
    """Last hidden state ``[B, T, E]``, where a router needs it."""

    def kind(self, kind: Kind) -> Tensor:
        """Keys or values ``[B, L, H, T, D]``."""
        return self.key_BLHTD if kind == "key" else self.value_BLHTD


class Distiller(nn.Module):
    """Student, projectors and losses. Only the student is saved as a model."""

    heads: Any
    space: Any
    weigh: FusionWeights
    gate: InjectionGate | None
    attention_maps: AttentionMaps
    kv_scale = 1.0  # of the losses against teachers; the trainer sets it at every step

    def __init__(
        self,
        student: Any,
        teachers: list[TeacherSpace],
        *,
        alignment: AlignmentConfig,
        projection: ProjectionConfig,
        fusion: FusionConfig,
        losses: LossConfig,
        num_tasks: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.capture = self.capture_of(student)
        self.teachers = teachers
        self.projection, self.fusion, self.losses = projection, fusion, losses
        geometry = self.capture.geometry
        self.heads = nn.ModuleDict()
        if not teachers:
            return
        for teacher in teachers:
            heads = nn.ModuleDict()
            for kind in KINDS:
                student_shape = geometry.shapes[kind]
                heads[kind] = TeacherHead(teacher, kind, student_shape, projection, self.projects)
            self.heads[_module_name(teacher.name)] = heads
        self.weigh = FusionWeights(
            fusion, teachers, geometry.hidden_size, geometry.num_layers, num_tasks
        )
        self.space = nn.ModuleDict()
        if projection.mode == "shared_space":
            shape = HeadShape(projection.space_heads, projection.space_dim)
            for kind in KINDS:
                self.space[kind] = SpaceAdapter(geometry.num_layers, geometry.shapes[kind], shape)
        if losses.inject:
            self.capture.check_rewritable()
            if not any(teacher.causal for teacher in teachers):
                names = ", ".join(teacher.name for teacher in teachers)
                raise ConfigError(
                    f"losses.inject: the teachers ({names}) attend in both directions, so their KV "
                    "at the prompt depends on what follows; add a decoder, or set losses.inject "
                    "to 0"
                )
            self.gate = None
            if losses.inject_style == "residual":
                self.gate = InjectionGate(geometry.num_layers, losses.inject_gate_init)
        if losses.attention_kl:
            self.attention_maps = AttentionMaps(student, alignment)

    def capture_of(self, student: Any) -> KVCapture:
        """Captures the student's queries, keys and values."""
        return KVCapture(student)

    @property
    def projects(self) -> bool:
        """Whether teachers are mapped into the student's (or the shared) space."""
        return not self.regresses or self.losses.inject > 0

    @property
    def regresses(self) -> bool:
        """Whether the student's KV is regressed onto the teachers' own."""
        return self.projection.mode == "student_to_teacher"

    @property
    def needs_all_layers(self) -> bool:
        """Whether a step needs the targets of all layers at once."""
        return self.projects or self.losses.cosine > 0 or self.losses.relation > 0

    def forward(
        self, batch: Batch, counts: Counts | None = None, *, figures: bool = False
    ) -> dict[str, Any]:
        """Losses of a batch.

        Args:
            batch: as ``Collate`` makes it, on the student's device.
            counts: ``num_labels``, ``num_covered``, ``num_injected``; this batch's if None.
            figures: also return what shows whether the target moves.

        Returns:
            ``loss``, the weighted sum; ``parts``, each loss by name before weighting; ``kv``, the
            weighted part that comes from teachers; all float32 scalars. ``figures``: the teachers'
            mean weights ``alpha [N]`` and the target's variance.
        """
        counts = counts or {}
        output = self.run_student(batch)
        parts = self.text_losses(batch, output, counts)
        measured: dict[str, Tensor] = {}
        if self.teachers:
            more, measured = self._teacher_losses(batch, output, counts, figures=figures)
            parts |= more
        loss, kv = weighted_sum(parts, self.losses, self.kv_scale)
        return {"loss": loss, "kv": kv, "parts": parts, "figures": measured}

    @staticmethod
    def count(batch: Batch) -> dict[str, Tensor]:
        """What the losses of a batch are divided by: the ``counts`` of ``forward``."""
        labels, injected = (num_predicted(batch[name]) for name in ("labels", "inject_labels"))
        return {
            "num_labels": labels,
            "num_covered": num_covered(batch),
            "num_injected": injected,
        }

    def run_student(self, batch: Batch) -> StudentOutput:
        """One forward pass of the student: logits, unrotated Q, K and V, last hidden state."""
        needs_hidden = bool(self.teachers) and self.weigh.needs_hidden
        with self.capture() as captured:
            output = self.student(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                output_hidden_states=needs_hidden,
                use_cache=False,
            )
        query, key, value = (torch.stack(layers, dim=1) for layers in zip(*captured, strict=True))
        hidden = output.hidden_states[-1] if needs_hidden else None
        return StudentOutput(output.logits, query, key, value, hidden)

    def text_losses(self, batch: Batch, output: StudentOutput, counts: Counts) -> dict[str, Tensor]:
        """Losses that need no teacher."""
        loss = cross_entropy(output.logits, batch["labels"], counts.get("num_labels"))
        return {"cross_entropy": loss}

    def _teacher_losses(
        self, batch: Batch, output: StudentOutput, counts: Counts, *, figures: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses against teachers by name, and what ``figures`` of ``forward`` requests."""
        alpha, covered_NBT = self.weigh(batch, output.hidden)
        covered_BT = covered_NBT.any(0)
        targets = self.targets(batch["teachers"]) if figures or self.needs_all_layers else {}
        # A router that learns from the task must not be drawn to what is easy to imitate.
        kv_alpha = alpha.detach() if self.losses.inject else alpha
        projected = self.projected(targets) if self.projects else {}
        fused = {}
        parts = {}
        covered = counts.get("num_covered", covered_BT.sum())
        if self.regresses:
            sums = self.regression_sums(output, batch["teachers"], targets, kv_alpha)
            parts = {name: total / covered.clamp_min(1) for name, total in sums.items()}
        else:
            fused = {kind: fuse(kv_alpha, teachers) for kind, teachers in projected.items()}
        maps = self.kv_errors(output, targets, fused, kv_alpha, covered_BT)
        if self.losses.entropy:
            sign = 1.0 if self.fusion.entropy == "specialized" else -1.0
            maps["entropy"] = sign * entropy(alpha).expand_as(covered_BT)
        weights = self.losses.weights()
        for name, error in maps.items():
            if weights[name]:
                parts[name] = reduce_tokens(error, covered_BT, covered)
        if self.losses.inject:
            parts["inject"] = self._inject(batch, projected, alpha, covered_NBT, counts)
        if not figures:
            return parts, {}
        compared = fused.values() or [x for ts in targets.values() for groups in ts for x in groups]
        variance = torch.stack([target_variance(x, covered_BT) for x in compared]).mean()
        return parts, {"alpha": mean_weights(alpha), "target_variance": variance}

    def head(self, name: str, kind: Kind) -> TeacherHead:
        """The maps of one teacher and kind."""
        head: TeacherHead = self.heads[_module_name(name)][kind]
        return head

    def heads_of(self, kind: Kind) -> list[TeacherHead]:
        """The maps of one kind, in the order of ``teachers``."""
        return [self.head(teacher.name, kind) for teacher in self.teachers]

    def layers(self, kind: Kind, teachers: Batch) -> list[list[LayerTargets]]:
        """Per teacher and group, targets of one kind that are made one layer at a time."""
        return [
            head.layers(teachers[space.name][kind], band_of(teachers[space.name]))
            for space, head in zip(self.teachers, self.heads_of(kind), strict=True)
        ]

    def targets(self, teachers: Batch) -> Targets:
        """The targets of all layers at once."""
        return {
            kind: [
                [layers.stacked() for layers in groups] for groups in self.layers(kind, teachers)
            ]
            for kind in KINDS
        }

    def projected(self, targets: Targets) -> dict[Kind, list[Tensor]]:
        """Every teacher as ``[B, L_s, H, T, D]`` in the student's or shared space, by kind."""
        return {
            kind: [h.projected(x) for h, x in zip(self.heads_of(kind), targets[kind], strict=True)]
            for kind in KINDS
        }

    def regression_sums(
        self, output: StudentOutput, teachers: Batch, targets: Targets, alpha_NBLT: Tensor
    ) -> dict[str, Tensor]:
        """In mode ``student_to_teacher``: errors of keys and of values, summed over tokens.

        Targets are made layer by layer where ``targets`` is empty.
        """
        sums: dict[str, Tensor] = {}
        for kind in KINDS:
            if not self.losses.weights()[kind]:
                continue
            rows: Sequence[Sequence[TargetOf]] = (
                [[partial(torch.select, x, 1) for x in groups] for groups in targets[kind]]
                if targets
                else self.layers(kind, teachers)
            )
            regressions = []
            for head, groups, alpha_BLT in zip(self.heads_of(kind), rows, alpha_NBLT, strict=True):
                regressions += head.regressions(groups, alpha_BLT)
            sums[kind] = regression_error(output.kind(kind), regressions, self.losses.distance)
        return sums

    def kv_errors(
        self,
        output: StudentOutput,
        targets: Targets,
        fused: Mapping[Kind, Tensor],
        alpha: Tensor,
        covered_BT: Tensor,
    ) -> dict[str, Tensor]:
        """K/V errors per token ``[B, T]`` by name, all but those of ``regression_sums``."""
        if self.regresses:
            if not (self.losses.cosine or self.losses.relation):
                return {}
            keys, values = (
                teacher_errors(output.kind(k), self.heads_of(k), targets[k], alpha, self.losses)
                for k in KINDS
            )
            return {name: (keys[name] + values[name]) / len(KINDS) for name in keys}
        if self.projection.mode != "joint":
            fused = {kind: target.detach() for kind, target in fused.items()}
        ours = {kind: self._in_target_space(output.kind(kind), kind) for kind in KINDS}
        maps = fused_errors(ours, fused, covered_BT, self.losses)
        if self.losses.attention_kl:
            maps["attention_kl"] = self.attention_maps(
                output.query_BLQTD, output.key_BLHTD, fused["key"], covered_BT
            )
        if self.losses.round_trip:
            maps["round_trip"] = self._round_trip(output, targets, alpha)
        return maps

    def comparisons(
        self, output: StudentOutput, kind: Kind, targets: Targets, alpha: Tensor
    ) -> list[tuple[list[int], Tensor, Tensor, Tensor]]:
        """What is compared for one kind: student layers, weight ``[B, L, T]``, ours, target."""
        num_layers = self.capture.geometry.num_layers
        wide = alpha.expand(-1, -1, num_layers, -1)
        if not self.regresses:
            ours = self._in_target_space(output.kind(kind), kind)
            target = fuse(alpha, self.projected(targets)[kind])
            return [(list(range(num_layers)), wide.sum(0), ours, target)]
        found = []
        for i, head in enumerate(self.heads_of(kind)):
            predictions = head.predictions(output.kind(kind))
            for group, ours, target in zip(head.groups, predictions, targets[kind][i], strict=True):
                layers = list(group.student_layers)
                found.append((layers, wide[i][:, layers], ours, target))
        return found

    def _inject(
        self,
        batch: Batch,
        projected: Mapping[Kind, list[Tensor]],
        alpha: Tensor,
        covered_NBT: Tensor,
        counts: Counts,
    ) -> Tensor:
        """Cross-entropy of what follows when the student runs on the teachers' fused KV."""
        causal = torch.tensor([t.causal for t in self.teachers], device=alpha.device)
        usable = covered_NBT & causal[:, None, None]
        alpha = renormalise(alpha, usable)
        fused = {kind: fuse(alpha, teachers) for kind, teachers in projected.items()}
        if self.projection.mode == "shared_space":
            fused = {kind: self.space[kind].out_of(z) for kind, z in fused.items()}
        mask_BT = batch["inject_mask"] & usable.any(0)
        with injecting(self.capture, fused["key"], fused["value"], mask_BT, self.gate):
            logits = self.student(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            ).logits
        return cross_entropy(logits, batch["inject_labels"], counts.get("num_injected"))

    def _in_target_space(self, student_BLHTD: Tensor, kind: Kind) -> Tensor:
        shared = self.projection.mode == "shared_space"
        return self.space[kind](student_BLHTD) if shared else student_BLHTD

    def _round_trip(self, output: StudentOutput, targets: Targets, alpha: Tensor) -> Tensor:
        """Error of every model after the way into the shared space and back: ``[B, T]``."""
        lost = [self.space[kind].round_trip_error(output.kind(kind).detach()) for kind in KINDS]
        weight_NBT = alpha.detach().mean(2)
        for kind in KINDS:
            for i, head in enumerate(self.heads_of(kind)):
                adapters: Any = head.project
                errors = [
                    a.round_trip_error(x) for a, x in zip(adapters, targets[kind][i], strict=True)
                ]
                lost.append(weight_NBT[i] * torch.stack(errors).mean(0))
        return torch.stack(lost).sum(0) / len(KINDS)


def _module_name(teacher: str) -> str:
    """A module's name must not contain dots; a teacher's may."""
    return teacher.replace(".", "·")
