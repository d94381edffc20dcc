"""The student, the projectors and the losses as one module: ``forward(batch) → losses``.

    codes → decode → standardise → place (layers, tokens) → project → fuse → errors

Where the target comes from, and what may move it (``docs/projection.md``):

``student_to_teacher``  the student's KV is regressed onto each teacher's standardised KV; the
                        teachers' errors are mixed by the fusion weights. Nothing moves the target
``frozen``              a fixed projector brings teachers into the student's space, where they are
                        fused. Nothing moves the target
``task``                the projector learns from ``inject`` alone; the K/V loss sees its output
                        detached
``joint``               the projector learns from the K/V loss too, and can absorb it
``shared_space``        every teacher and the student map into one space; targets are detached
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.distill import (
    OF_TEXT,
    AlignmentConfig,
    FusionConfig,
    LossConfig,
    ProjectionConfig,
)
from kvdistill.distill.align.band import Band
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.fuse.fusion_weights import FusionWeights
from kvdistill.distill.fuse.weights import entropy, fuse, mean_weights, renormalise
from kvdistill.distill.kv_losses import (
    Rows,
    fused_errors,
    merge_kinds,
    regression_sums,
    rows_of,
    teacher_errors,
)
from kvdistill.distill.losses.absorption import target_variance
from kvdistill.distill.losses.attention_maps import AttentionMaps
from kvdistill.distill.losses.cross_entropy import cross_entropy, num_covered, num_predicted
from kvdistill.distill.losses.weighting import reduce_tokens
from kvdistill.distill.project.projections import SpaceAdapter
from kvdistill.distill.student.injection import InjectionGate, KVInjection
from kvdistill.distill.student.outputs import StudentView
from kvdistill.distill.targets import TeacherHead, TeacherSpace
from kvdistill.errors import ConfigError
from kvdistill.types import KINDS, Kind

Counts = Mapping[str, Tensor]
"""Tokens that losses are divided by, over all micro-batches and ranks of a step."""


class Distiller(nn.Module):
    """Student, projectors and losses. The student alone is what gets saved as a model."""

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
            self.heads[_module_name(teacher.name)] = nn.ModuleDict(
                {
                    kind: TeacherHead(
                        teacher, kind, geometry.heads, projection, projects=self.projects
                    )
                    for kind in KINDS
                }
            )
        self.weigh = FusionWeights(
            fusion, teachers, geometry.hidden_size, geometry.num_layers, num_tasks
        )
        self.space = nn.ModuleDict()
        if projection.mode == "shared_space":
            shape = HeadShape(projection.space_heads, projection.space_dim)
            for kind in KINDS:
                self.space[kind] = SpaceAdapter(geometry.num_layers, geometry.heads, shape)
        if losses.inject:
            _refuse_blind_injection(teachers)
            residual = losses.inject_style == "residual"
            self.gate = None
            if residual:
                self.gate = InjectionGate(geometry.num_layers, losses.inject_gate_init)
        if losses.attention_kl:
            self.attention_maps = AttentionMaps(student, alignment)

    def capture_of(self, student: Any) -> KVCapture:
        """What reads the student's keys and values."""
        return KVCapture(student)

    @property
    def projects(self) -> bool:
        """Whether teachers are brought into the student's (or the shared) space."""
        return not self.regresses or self.losses.inject > 0

    @property
    def regresses(self) -> bool:
        """Whether the student's KV is regressed onto the teachers' own."""
        return self.projection.mode == "student_to_teacher"

    @property
    def needs_whole(self) -> bool:
        """Whether a step needs the targets of all layers at once."""
        return self.projects or self.losses.cosine > 0 or self.losses.relation > 0

    def forward(
        self, batch: Batch, counts: Counts | None = None, *, figures: bool = False
    ) -> dict[str, Any]:
        """Losses of a batch.

        Args:
            batch: as ``Collate`` makes it, on the student's device.
            counts: ``num_labels``, ``num_covered``, ``num_injected``; this batch's if None.
            figures: also give what tells whether the target moves.

        Returns:
            ``loss``, the weighted sum; ``parts``, each loss by name before weighting; ``kv``, the
            weighted part that comes from teachers; all float32 scalars. ``figures``: the teachers'
            mean weights ``alpha [N]`` and the target's variance.
        """
        counts = counts or {}
        view = self.view(batch)
        parts = self.text_parts(batch, view, counts)
        shown: dict[str, Tensor] = {}
        if self.teachers:
            more, shown = self._teacher_parts(batch, view, counts, figures=figures)
            parts |= more
        weight = self.losses.weights()
        of_teachers = [name for name in parts if name not in (*OF_TEXT, "inject")]
        weight |= {name: self.kv_scale * weight[name] for name in of_teachers}
        weighted = {name: weight[name] * value for name, value in parts.items()}
        kv = [weighted[name] for name in of_teachers] or [torch.zeros_like(parts["cross_entropy"])]
        return {
            "loss": torch.stack(list(weighted.values())).sum(),
            "kv": torch.stack(kv).sum(),
            "parts": parts,
            "figures": shown,
        }

    @staticmethod
    def count(batch: Batch) -> dict[str, Tensor]:
        """What the losses of a batch are divided by: the numbers that ``forward`` is given."""
        labels, injected = (num_predicted(batch[name]) for name in ("labels", "inject_labels"))
        return {
            "num_labels": labels,
            "num_covered": num_covered(batch),
            "num_injected": injected,
        }

    def text_parts(self, batch: Batch, view: StudentView, counts: Counts) -> dict[str, Tensor]:
        """Losses that need no teacher."""
        loss = cross_entropy(view.logits, batch["labels"], counts.get("num_labels"))
        return {"cross_entropy": loss}

    def view(self, batch: Batch) -> StudentView:
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
        return StudentView(output.logits, query, key, value, hidden)

    def targets(self, teachers: Batch) -> dict[Kind, list[list[Tensor]]]:
        """Per kind, teacher and group: the standardised target ``[B, L, H_t, T, D_t]``."""
        return {
            kind: [
                self.head(teacher.name, kind).targets(
                    teachers[teacher.name][kind], band_of(teachers[teacher.name])
                )
                for teacher in self.teachers
            ]
            for kind in KINDS
        }

    def head(self, name: str, kind: Kind) -> TeacherHead:
        """The maps of one teacher and kind."""
        heads: Any = self.heads[_module_name(name)]
        head: TeacherHead = heads[kind]
        return head

    def projected(self, targets: Mapping[Kind, list[list[Tensor]]]) -> dict[Kind, list[Tensor]]:
        """Every teacher as ``[B, L_s, H, T, D]`` in the student's or shared space, by kind."""
        return {
            kind: [
                self.head(teacher.name, kind).projected(target)
                for teacher, target in zip(self.teachers, targets[kind], strict=True)
            ]
            for kind in KINDS
        }

    def rows(self, teachers: Batch) -> Rows:
        """``targets`` of each layer when it is asked for, so that they never all exist."""
        return {
            kind: [
                self.head(space.name, kind).layers(
                    teachers[space.name][kind], band_of(teachers[space.name])
                )
                for space in self.teachers
            ]
            for kind in KINDS
        }

    def kv_maps(
        self,
        view: StudentView,
        targets: Mapping[Kind, list[list[Tensor]]],
        projected: Mapping[Kind, list[Tensor]],
        alpha: Tensor,
        covered_BT: Tensor,
    ) -> dict[str, Tensor]:
        """K/V errors per token ``[B, T]`` by name; a regression's own is summed elsewhere."""
        if self.regresses:
            maps: dict[str, Tensor] = {}
            for kind in KINDS if self.losses.cosine or self.losses.relation else ():
                heads = [self.head(teacher.name, kind) for teacher in self.teachers]
                errors = teacher_errors(view.kind(kind), heads, targets[kind], alpha, self.losses)
                maps |= errors if kind == "key" else merge_kinds(maps, errors)
        else:
            fused = {kind: fuse(alpha, teachers) for kind, teachers in projected.items()}
            moving = self.projection.mode == "joint"
            target = {k: x if moving else x.detach() for k, x in fused.items()}
            ours = {kind: self._in_target_space(view.kind(kind), kind) for kind in KINDS}
            maps = fused_errors(ours, target, covered_BT, self.losses)
            if self.losses.attention_kl:
                maps["attention_kl"] = self.attention_maps(view, target["key"], covered_BT)
            if self.losses.round_trip:
                maps["round_trip"] = self._round_trip(view, targets, alpha)
        return maps

    def pairs(
        self,
        view: StudentView,
        kind: Kind,
        targets: Mapping[Kind, list[list[Tensor]]],
        alpha: Tensor,
    ) -> list[tuple[list[int], Tensor, Tensor, Tensor]]:
        """What is compared for one kind: student layers, weight ``[B, L, T]``, ours, target."""
        num_layers = self.capture.geometry.num_layers
        wide = alpha.expand(-1, -1, num_layers, -1)
        if self.projection.mode != "student_to_teacher":
            ours = self._in_target_space(view.kind(kind), kind)
            target = fuse(alpha, self.projected(targets)[kind])
            return [(list(range(num_layers)), wide.sum(0), ours, target)]
        found = []
        for i, teacher in enumerate(self.teachers):
            head = self.head(teacher.name, kind)
            guesses = head.guesses(view.kind(kind))
            for group, guess, target in zip(head.groups, guesses, targets[kind][i], strict=True):
                layers = list(group.student_layers)
                found.append((layers, wide[i][:, layers], guess, target))
        return found

    def _teacher_parts(
        self, batch: Batch, view: StudentView, counts: Counts, *, figures: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        alpha, covered_NBT = self.weigh(batch, view.hidden)
        covered_BT = covered_NBT.any(0)
        targets = self.targets(batch["teachers"]) if figures or self.needs_whole else {}
        # A router with a task to learn from must not be drawn to what is easy to imitate.
        kv_alpha = alpha.detach() if self.losses.inject else alpha
        projected = self.projected(targets) if self.projects else {}
        weights = self.losses.weights()
        covered = counts.get("num_covered", covered_BT.sum())
        parts = {}
        if self.regresses:
            rows = rows_of(targets) if targets else self.rows(batch["teachers"])
            heads = {kind: [self.head(t.name, kind) for t in self.teachers] for kind in KINDS}
            sums = regression_sums(view, heads, rows, kv_alpha, self.losses)
            parts = {name: total / covered.clamp_min(1) for name, total in sums.items()}
        maps = self.kv_maps(view, targets, projected, kv_alpha, covered_BT)
        if self.losses.entropy:
            sign = 1.0 if self.fusion.entropy == "specialized" else -1.0
            maps["entropy"] = sign * entropy(alpha).expand_as(covered_BT)
        parts |= {
            name: reduce_tokens(error, covered_BT, covered)
            for name, error in maps.items()
            if weights[name]
        }
        if self.losses.inject:
            parts["inject"] = self._inject(batch, projected, alpha, covered_NBT, counts)
        if not figures:
            return parts, {}
        variance = self._variance(targets, projected, kv_alpha, covered_BT)
        return parts, {"alpha": mean_weights(alpha), "target_variance": variance}

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
            fused = {kind: self._space(kind).out_of(z) for kind, z in fused.items()}
        mask_BT = batch["inject_mask"] & usable.any(0)
        inject = KVInjection(self.capture)
        with inject(fused["key"], fused["value"], mask_BT, self.gate):
            logits = self.student(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            ).logits
        return cross_entropy(logits, batch["inject_labels"], counts.get("num_injected"))

    def _in_target_space(self, student_BLHTD: Tensor, kind: Kind) -> Tensor:
        if self.projection.mode != "shared_space":
            return student_BLHTD
        projected: Tensor = self._space(kind)(student_BLHTD)
        return projected

    def _space(self, kind: Kind) -> Any:
        return self.space[kind]

    def _round_trip(
        self, view: StudentView, targets: Mapping[Kind, list[list[Tensor]]], alpha: Tensor
    ) -> Tensor:
        """What every model loses on its way into the shared space and back: ``[B, T]``."""
        lost = [self._space(kind).round_trip_error(view.kind(kind).detach()) for kind in KINDS]
        weight_NBT = alpha.detach().mean(2)
        for kind in KINDS:
            for i, teacher in enumerate(self.teachers):
                adapters: Any = self.head(teacher.name, kind).project
                errors = [
                    a.round_trip_error(x) for a, x in zip(adapters, targets[kind][i], strict=True)
                ]
                lost.append(weight_NBT[i] * torch.stack(errors).mean(0))
        return torch.stack(lost).sum(0) / len(KINDS)

    @torch.no_grad()
    def _variance(
        self,
        targets: Mapping[Kind, list[list[Tensor]]],
        projected: Mapping[Kind, list[Tensor]],
        alpha: Tensor,
        covered_BT: Tensor,
    ) -> Tensor:
        """Variance of what the student is compared with; it falls when the target collapses."""
        if self.projection.mode == "student_to_teacher":
            found = [x for kind in KINDS for groups in targets[kind] for x in groups]
        else:
            found = [fuse(alpha, teachers) for teachers in projected.values()]
        return torch.stack([target_variance(x, covered_BT) for x in found]).mean()


def _refuse_blind_injection(teachers: list[TeacherSpace]) -> None:
    if not any(teacher.causal for teacher in teachers):
        raise ConfigError(
            f"losses.inject: all teachers ({', '.join(t.name for t in teachers)}) read in both "
            "directions, so their KV at the prompt has read what follows; add a decoder, or set "
            "losses.inject to 0"
        )


def band_of(teacher: Batch) -> Band:
    """The alignment that a teacher's part of a batch carries."""
    return Band(teacher["start"], teacher["weight"], teacher["covered"])


def _module_name(teacher: str) -> str:
    """A teacher's name may hold dots, a module's name may not."""
    return teacher.replace(".", "·")
