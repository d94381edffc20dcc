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
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.kv_capture import KVCapture, stack_layers
from kvdistill.attention.language_head import DeferredLogits, LanguageHead
from kvdistill.config.distill import AlignmentConfig, FusionConfig, LossConfig, ProjectionConfig
from kvdistill.distill.align.band import band_of
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.fuse.fusion_weights import FusionWeights
from kvdistill.distill.fuse.weights import ServedWeights, contested_entropy, fuse
from kvdistill.distill.kv_losses import (
    fused_errors,
    kv_figures,
    round_trip_errors,
    teacher_errors,
)
from kvdistill.distill.losses.attention_maps import AttentionMaps
from kvdistill.distill.losses.load_balancing import LoadBalancing
from kvdistill.distill.losses.logits import LogitLoss
from kvdistill.distill.losses.pointwise import (
    IGNORED_LABEL,
    cross_entropy,
    num_predicted,
    share_of_step,
)
from kvdistill.distill.losses.regression import regression_error
from kvdistill.distill.losses.weighting import sum_served, weighted_sum
from kvdistill.distill.project.projections import SpaceAdapter
from kvdistill.distill.student.injection import InjectionGate, injecting
from kvdistill.distill.targets import (
    LayerTargets,
    TargetOf,
    TeacherHead,
    TeacherSpace,
    unmeasured,
)
from kvdistill.errors import ConfigError, StudentError
from kvdistill.types import KINDS, Kind

Counts = Mapping[str, Tensor]
"""What losses are divided by, over all micro-batches and ranks of a step."""

Targets = Mapping[Kind, list[list[Tensor]]]
"""Per kind, teacher and group: the standardised target ``[B, L, H_t, T, D_t]``."""

Rows = Sequence[Sequence[TargetOf]]
"""Per teacher and group: targets by row of the student layers that the group serves."""


@dataclass(frozen=True, eq=False)
class StudentOutput:
    """One forward pass of the student; keys and queries are not rotated."""

    logits: Tensor | DeferredLogits
    query_BLQTD: Tensor | None  # where a loss compares attention
    key_BLHTD: Tensor
    value_BLHTD: Tensor
    hidden: Tensor | None  # last state [B, T, E], where a router needs it
    _: KW_ONLY
    router_aux: Tensor | None = None  # load-balancing loss of this pass, where it has a weight
    hidden_BLHTD: Tensor | None = None  # layers' outputs as one head, where a loss compares them

    def kind(self, kind: Kind) -> Tensor:
        """Keys, values or layers' outputs ``[B, L, H, T, D]``."""
        found: Tensor = getattr(self, f"{kind}_BLHTD")
        return found


class Distiller(nn.Module):
    """Student, projectors and losses. Only the student is saved as a model."""

    heads: Any
    space: Any
    weigh: FusionWeights
    gate: InjectionGate | None
    standardise_student: Any
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
        tasks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.capture = self.capture_of(student)
        self.language_head = LanguageHead(self.language_model)
        self.teachers = teachers
        self.projection, self.fusion = projection, fusion
        self.balance = LoadBalancing(self.language_model, losses.router_aux)
        self.losses = losses.model_copy(update={"router_aux": self.balance.weight})
        geometry = self.capture.geometry
        self.heads, self.standardise_student = nn.ModuleDict(), nn.ModuleDict()
        if not teachers:
            return
        if self.regresses and projection.init == "ridge":
            for kind in losses.kinds:
                shape = geometry.shapes[kind]
                self.standardise_student[kind] = unmeasured(geometry.num_layers, shape)
        for teacher in teachers:
            heads = nn.ModuleDict()
            for kind in losses.kinds:
                own = geometry.shapes[kind]
                heads[kind] = TeacherHead(teacher, kind, own, projection, self.projects)
            self.heads[_module_name(teacher.name)] = heads
        self.weigh = FusionWeights(
            fusion, teachers, geometry.hidden_size, geometry.num_layers, tasks or {}
        )
        self.logit_loss = LogitLoss(self.weigh.names, losses.logits_temperature)
        self.space = nn.ModuleDict()
        if projection.mode == "shared_space":
            shape = HeadShape(projection.space_heads, projection.space_dim)
            for kind in KINDS:
                self.space[kind] = SpaceAdapter(geometry.num_layers, geometry.shapes[kind], shape)
        self.decoders = [i for i, teacher in enumerate(teachers) if teacher.causal]
        if losses.inject:
            self.capture.check_rewritable()
            if not self.decoders:
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

    @property
    def language_model(self) -> Any:
        """The student as transformers has it."""
        return self.student

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
            counts: as ``count`` returns them, summed over a step; this batch's if None.
            figures: also return what shows whether the target moves.

        Returns:
            ``loss``, the weighted sum; ``parts``, each loss by name before weighting; ``kv``, the
            weighted part that compares with teachers; all float32 scalars. ``figures``: the
            teachers' mean weights ``alpha [N]``, the target's variance and its explained share.
        """
        counts = counts or self.count(batch)
        output = self.run_student(batch)
        parts = self.text_losses(batch, output, counts)
        measured: dict[str, Tensor] = {}
        if self.teachers:
            more, measured = self._teacher_losses(batch, output, counts, figures=figures)
            parts |= more
        loss, kv = weighted_sum(parts, self.losses, self.kv_scale)
        return {"loss": loss, "kv": kv, "parts": parts, "figures": measured}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """What the losses of a batch are divided by: the ``counts`` of ``forward``.

        ``num_labels``, ``num_injected``    predicted tokens: all, and those after injected KV
        ``num_served``, ``num_contested``   see ``FusionWeights.count``
        ``num_predictions``                 tokens that a teacher's stored logits predict
        """
        counts = {"num_labels": num_predicted(batch["labels"])}
        if self.teachers:
            counts |= self.weigh.count(batch)
            if self.losses.logits:
                counts |= self.logit_loss.count(batch, self.weigh.serving(batch))
        if self.losses.inject:
            counts["num_injected"] = num_predicted(self._injection(batch)[1])
        return counts

    def run_student(self, batch: Batch) -> StudentOutput:
        """One forward pass of the student: logits, unrotated Q, K and V, last hidden state."""
        needs_hidden = bool(self.teachers) and self.weigh.needs_hidden
        outputs: list[Tensor] | None = [] if self.losses.hidden else None
        with self.capture(queries=self.losses.attention_kl > 0, outputs=outputs) as captured:
            output, logits = self.language_head.run(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                output_hidden_states=needs_hidden,
                use_cache=False,
                **self.balance.inputs,
            )
        query, key, value = stack_layers(captured)
        hidden = output.hidden_states[-1] if needs_hidden else None
        if hidden is not None and hidden.ndim != 3:
            form = f"one hidden state a token, the student gives {list(hidden.shape)}"
            raise StudentError(f"fusion.method {self.fusion.method} reads {form}; use fixed")
        aux = self.balance(output, batch["attention_mask"])
        own = torch.stack(outputs, dim=1) if outputs else None
        return StudentOutput(logits, query, key, value, hidden, router_aux=aux, hidden_BLHTD=own)

    def text_losses(self, batch: Batch, output: StudentOutput, counts: Counts) -> dict[str, Tensor]:
        """Losses that need no teacher."""
        labels, number = batch["labels"], counts.get("num_labels")
        parts = {"cross_entropy": cross_entropy(output.logits, labels, number)}
        if output.router_aux is not None:
            parts["router_aux"] = output.router_aux * share_of_step(labels, number)
        return parts

    def _teacher_losses(
        self, batch: Batch, output: StudentOutput, counts: Counts, *, figures: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses against teachers by name, and what ``figures`` requests."""
        mixture = self.weigh(batch, output.hidden)
        alpha = mixture.alpha()
        targets = self.targets(batch["teachers"]) if self.needs_all_layers else {}
        # A router that learns from the task must not be drawn to what is easy to imitate.
        kv_alpha = alpha.detach() if self.losses.inject else alpha
        projected = self.projected(targets) if self.projects else {}
        fused = {}
        if self.regresses:
            sums = self.regression_sums(output, batch["teachers"], targets, kv_alpha)
        else:
            fused = {kind: fuse(kv_alpha, teachers) for kind, teachers in projected.items()}
            sums = {}
        sums |= self.kv_errors(output, targets, fused, kv_alpha)
        # Sums are over tokens and means over layers, so their number is per layer too.
        num_served = counts["num_served"].clamp_min(1) / alpha.shape[2]
        weights = self.losses.weights()
        parts = {name: total / num_served for name, total in sums.items() if weights[name]}
        if self.losses.entropy:
            total = contested_entropy(mixture, self.fusion.entropy)
            parts["entropy"] = total / counts["num_contested"].clamp_min(1)
        if self.losses.logits:
            total = self.logit_loss(output.logits, batch, kv_alpha, mixture.serves_NBLT)
            parts["logits"] = total / counts["num_predictions"].clamp_min(1)
        if self.losses.inject:
            parts["inject"] = self._inject(batch, projected, mixture, counts)
        if not figures:
            return parts, {}
        kinds = [kind for kind in self.losses.kinds if kind in parts] or list(KINDS)
        rows: Mapping[Kind, Any] = targets or {k: self.layers(k, batch["teachers"]) for k in kinds}
        compared = (x for k in kinds for x in self.compared(k, rows, alpha, fused.get(k)))
        errors = [parts[kind] for kind in kinds if kind in parts]
        shown = kv_figures(compared, alpha, errors, counts["num_served"], self.losses)
        return parts, shown | self.weigh.balance.figures()

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

    def target_rows(self, teachers: Batch, targets: Targets) -> Mapping[Kind, Rows]:
        """Per kind, teacher and group: row → target. Of ``targets``, or else made row by row."""
        return {
            kind: [[partial(torch.select, x, 1) for x in groups] for groups in targets[kind]]
            if targets
            else self.layers(kind, teachers)
            for kind in self.losses.kinds
        }

    def regressed(self, output: StudentOutput, kind: Kind) -> Tensor:
        """The student's KV as heads read it: standardised where these are fitted."""
        kv_BLHTD = output.kind(kind)
        return self.standardise_student[kind](kv_BLHTD) if self.standardise_student else kv_BLHTD

    def targets(self, teachers: Batch) -> Targets:
        """The targets of all layers at once."""
        return {
            kind: [
                [layers.stacked() for layers in groups] for groups in self.layers(kind, teachers)
            ]
            for kind in self.losses.kinds
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
        """In mode ``student_to_teacher``, errors by kind; without ``targets``, layer by layer."""
        sums: dict[str, Tensor] = {}
        rows = self.target_rows(teachers, targets)
        for kind in self.losses.kinds:
            if not self.losses.weights()[kind]:
                continue
            heads = enumerate(zip(self.heads_of(kind), rows[kind], alpha_NBLT, strict=True))
            regressions = [x for i, (h, xs, alpha) in heads for x in h.regressions(xs, alpha, i)]
            ours, balancing = self.regressed(output, kind), self.weigh.balance.balancing(kind)
            sums[kind] = regression_error(ours, regressions, self.losses.distance, balancing)
        return sums

    def kv_errors(
        self,
        output: StudentOutput,
        targets: Targets,
        fused: Mapping[Kind, Tensor],
        alpha: Tensor,
    ) -> dict[str, Tensor]:
        """K/V errors by name, all but those of ``regression_sums``; see ``kv_losses``."""
        if self.regresses:
            if not (self.losses.cosine or self.losses.relation):
                return {}
            pairs = {k: (output.kind(k), self.regressed(output, k)) for k in KINDS}
            keys, values = (
                teacher_errors(pairs[k], self.heads_of(k), targets[k], alpha, self.losses)
                for k in KINDS
            )
            return {name: (keys[name] + values[name]) / len(KINDS) for name in keys}
        if self.projection.mode != "joint":
            fused = {kind: target.detach() for kind, target in fused.items()}
        ours = {kind: self.in_target_space(output.kind(kind), kind) for kind in KINDS}
        served_BLT = alpha.sum(0) > 0
        sums = fused_errors(ours, fused, served_BLT, self.losses)
        if self.losses.attention_kl and output.query_BLQTD is not None:
            error_BLT = self.attention_maps(
                output.query_BLQTD, output.key_BLHTD, fused["key"], served_BLT
            )
            sums["attention_kl"] = sum_served(error_BLT, served_BLT.float()) / alpha.shape[2]
        if self.losses.round_trip:
            lost = [
                round_trip_errors(
                    self.space[kind], output.kind(kind), self.heads_of(kind), targets[kind], alpha
                )
                for kind in KINDS
            ]
            sums["round_trip"] = torch.stack(lost).mean()
        return sums

    def compared(
        self, kind: Kind, targets: Mapping[Kind, Any], alpha: Tensor, fused: Tensor | None = None
    ) -> list[tuple[list[int], Tensor, Any]]:
        """What is compared for one kind: student layers, weight ``[B, L, T]``, target."""
        if not self.regresses:
            target = fuse(alpha, self.projected(targets)[kind]) if fused is None else fused
            return [(list(range(alpha.shape[2])), alpha.sum(0), target)]
        return [
            (layers := list(group.student_layers), weight_BLT[:, layers], target)
            for head, weight_BLT, xs in zip(self.heads_of(kind), alpha, targets[kind], strict=True)
            for group, target in zip(head.groups, xs, strict=True)
        ]

    def predictions(self, output: StudentOutput, kind: Kind) -> list[Tensor]:
        """The student's side of what is ``compared``."""
        if not self.regresses:
            return [self.in_target_space(output.kind(kind), kind)]
        ours = self.regressed(output, kind)
        return [x for head in self.heads_of(kind) for x in head.predictions(ours)]

    def _inject(
        self,
        batch: Batch,
        projected: Mapping[Kind, list[Tensor]],
        mixture: ServedWeights,
        counts: Counts,
    ) -> Tensor:
        """Cross-entropy of what follows when the student runs on the decoders' fused KV.

        A layer's tokens that no decoder serves keep the student's own KV.
        """
        alpha = mixture.alpha(self.decoders)
        fused = {kind: fuse(alpha, teachers) for kind, teachers in projected.items()}
        if self.projection.mode == "shared_space":
            fused = {kind: self.space[kind].out_of(z) for kind, z in fused.items()}
        mask_BLT, labels = self._injection(batch)
        with injecting(self.capture, fused["key"], fused["value"], mask_BLT, self.gate):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            _, logits = self.language_head.run(**inputs, use_cache=False)
        return cross_entropy(logits, labels, counts["num_injected"])

    def _injection(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where KV is injected ``[B, L, T]``, and labels of the samples that get any ``[B, T]``."""
        served_BLT = self.weigh.serving(batch)[self.decoders].any(0)
        mask_BLT = served_BLT & batch["inject_mask"].unsqueeze(1)
        missed_B1 = ~mask_BLT.flatten(1).any(1, keepdim=True)
        return mask_BLT, batch["inject_labels"].masked_fill(missed_B1, IGNORED_LABEL)

    def in_target_space(self, student_BLHTD: Tensor, kind: Kind) -> Tensor:
        """The student's KV in the space where targets are fused: its own, or the shared one."""
        shared = self.projection.mode == "shared_space"
        return self.space[kind](student_BLHTD) if shared else student_BLHTD


def _module_name(teacher: str) -> str:
    """A module's name must not contain dots; a teacher's may."""
    return teacher.replace(".", "·")
