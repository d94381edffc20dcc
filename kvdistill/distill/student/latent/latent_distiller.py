"""``LatentDistiller``: the losses of a latent student.

    CE(answer | latents, question) + CE(rationale, answer | question) + CODI + keys and values

after *KaVa: Latent Reasoning via Compressed KV-Cache Distillation* (arXiv 2510.02312). It is a
``Distiller`` whose student is captured at its latent positions, and whose targets are the teacher
tokens that an eviction keeps. The store holds keys, importance and segments but no eviction, so
another method, budget or λ needs no new extraction. Keys are ranked as in the papers: rotated with
the teacher's own rotary embedding, at the teacher's own positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.attention.eviction import Eviction, evict, num_evicted
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.attention.rotary import rotate
from kvdistill.config.distill import LatentConfig
from kvdistill.distill.align.layers import LayerMap
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.distiller import Counts, Distiller, StudentOutput
from kvdistill.distill.losses.pointwise import (
    IGNORED_LABEL,
    cross_entropy,
    hidden_error,
    num_predicted,
    share_of_step,
)
from kvdistill.distill.losses.weighting import sum_served
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.distill.targets import GroupSpace
from kvdistill.errors import ConfigError
from kvdistill.store.manifest import RotarySpec, TeacherManifest
from kvdistill.types import KINDS, Kind


def nearest_layers(mapping: LayerMap) -> LayerMap:
    """Round a layer map to whole layers, since two layers keep different tokens."""
    rows = zip(mapping.lower, mapping.upper, mapping.fraction, strict=True)
    layers = tuple(up if part >= 0.5 else low for low, up, part in rows)
    return LayerMap(layers, layers, (0.0,) * len(layers))


@dataclass(frozen=True)
class RationaleEviction:
    """Evicts tokens of one teacher's rationales, down to the latents' budget."""

    latent: LatentConfig
    rotary: Mapping[int, RotarySpec]
    """Per stored layer; empty where keys are not rotated."""

    @staticmethod
    def of(latent: LatentConfig, manifest: TeacherManifest) -> RationaleEviction:
        """Set up the eviction for a stored teacher.

        A teacher that was extracted with eviction has ordered slots, whose tokens differ between
        heads: slots that fit into the budget are all kept.

        Raises:
            ConfigError: more slots than the budget, and a method that needs token positions.
        """
        stored, method = manifest.eviction, latent.eviction.method
        if stored is None:
            return RationaleEviction(latent, manifest.rotary)
        if stored.budget <= latent.budget:
            first = latent.eviction.model_copy(update={"method": "right_crop"})
            return RationaleEviction(latent.model_copy(update={"eviction": first}), {})
        if method.startswith("rkv"):
            raise ConfigError(
                f"latent.eviction.method {method} ranks keys at their tokens' positions, which "
                f"teacher {manifest.name!r}, extracted with eviction to {stored.budget} slots, no "
                f"longer has; use importance, random or uniform to keep {latent.budget} of them, "
                "or that budget at extraction"
            )
        return RationaleEviction(latent, {})

    def select(self, group: GroupSpace, key_BLHTD: Tensor, teacher: Batch) -> Eviction:
        """Select the kept tokens per layer and head, padded to the number of latents.

        ``key_BLHTD`` are the group's stored keys, decoded and unrotated; ``teacher`` is the
        teacher's part of a batch.
        """
        eviction = self.latent.eviction
        layers = group.layer_map.needed
        by_keys = eviction.method.startswith("rkv")
        kept = evict(
            eviction.method,
            teacher["rationale"],
            len(layers),
            key_BLHTD.shape[2],
            self.latent.budget,
            key_BLHTD=self._rotated(key_BLHTD, layers, teacher["length"]) if by_keys else None,
            importance_BLHT=teacher["importance"].get(group.prefix),
            mix=eviction.mix,
            seed_B=teacher["seed"],
        )
        return kept.padded(self.latent.positions)

    def _rotated(self, key_BLHTD: Tensor, layers: Sequence[int], length_B: Tensor) -> Tensor:
        """Keys as the teacher's attention saw them; longrope rotates by the text's length."""
        if not self.rotary:
            return key_BLHTD
        position_T = torch.arange(key_BLHTD.shape[3], device=key_BLHTD.device)

        def turned(key_BHTD: Tensor, spec: RotarySpec) -> Tensor:
            if spec.trained_length is None:
                return rotate(key_BHTD, position_T, spec)
            rows = zip(key_BHTD, length_B.tolist(), strict=True)
            return torch.stack([rotate(row, position_T, spec, length) for row, length in rows])

        rows = zip(key_BLHTD.unbind(1), layers, strict=True)
        rotated = [turned(key_BHTD, self.rotary[layer]) for key_BHTD, layer in rows]
        return torch.stack(rotated, dim=1).to(key_BLHTD.dtype)


@dataclass(frozen=True, eq=False)
class LatentOutput(StudentOutput):
    """Keys and values are the latents', ``T`` is ``M``; logits are those of eot and the answer."""

    cue_BLE: Tensor
    """Every layer's output at eot."""


class LatentDistiller(Distiller):
    """``LatentStudent``, projectors and losses."""

    student: LatentStudent

    def __init__(
        self,
        student: LatentStudent,
        teachers: list[Any],
        manifests: dict[str, TeacherManifest],
        **settings: Any,
    ) -> None:
        super().__init__(student, teachers, **settings)
        if self.losses.router_aux and not self.losses.rationale:
            raise ConfigError(
                "losses.router_aux: the experts of a latent student are balanced in its pass over "
                "the full text; give losses.rationale a weight, or set losses.router_aux to 0"
            )
        self.latent: LatentConfig = student.config
        self.evictions = {
            name: RationaleEviction.of(self.latent, m) for name, m in manifests.items()
        }
        ours = self.capture.geometry
        self.cues = nn.ModuleList(
            CueMap(ours.num_layers, ours.hidden_size, manifests[teacher.name], teacher.depths)
            for teacher in (teachers if self.losses.codi else ())
        )

    @property
    def language_model(self) -> Any:
        """The one inside the student."""
        return self.student.backbone

    def capture_of(self, student: LatentStudent) -> KVCapture:
        """Capture of the language model inside the student."""
        return KVCapture(student.backbone)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """As ``Distiller.count``, with labels of the full text and samples for the CODI term."""
        counts = super().count(batch)
        if "rationale_labels" in batch:
            counts["num_words"] = num_predicted(batch["rationale_labels"])
        counts["num_samples"] = _answered(batch).sum()
        return counts

    def run_student(self, batch: Batch) -> LatentOutput:
        """Run latents and answer, capturing the last pass, which the answer attends to."""
        prefix, x_BME = self.student.think(batch["question_ids"], batch["question_mask"])
        with self.capture() as captured:
            thought = self.student.conclude(
                prefix, x_BME, batch["answer_ids"], batch["answer_mask"]
            )
        key, value = (
            torch.stack([getattr(layer, kind)[:, :, thought.columns] for layer in captured], dim=1)
            for kind in KINDS
        )
        return LatentOutput(thought.answer_logits, None, key, value, thought.latents, thought.cue)

    def text_losses(self, batch: Batch, view: StudentOutput, counts: Counts) -> dict[str, Tensor]:
        """Cross-entropy of the answer after the latents, and of the full text; CODI."""
        parts = super().text_losses(batch, view, counts)
        if self.losses.rationale:
            output, logits = self.language_head.run(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                **self.balance.inputs,
            )
            labels, number = batch["rationale_labels"], counts.get("num_words")
            parts["rationale"] = cross_entropy(logits, labels, number)
            aux = self.balance(output, batch["attention_mask"])
            if aux is not None:
                parts["router_aux"] = aux * share_of_step(labels, number)
        if self.losses.codi and isinstance(view, LatentOutput):
            parts["codi"] = self._codi(batch, view, counts)
        return parts

    @property
    def needs_all_layers(self) -> bool:
        """True: an eviction ranks tokens by the keys of all layers."""
        return True

    def targets(self, teachers: Batch) -> dict[Kind, list[list[Tensor]]]:
        """Per kind, teacher and group: the kept tokens ``[B, L, H_t, M, D_t]``."""
        found: dict[Kind, list[list[Tensor]]] = {kind: [] for kind in KINDS}
        for space in self.teachers:
            teacher, keys = teachers[space.name], self.head(space.name, "key")
            with torch.no_grad():
                kept = [
                    self.evictions[space.name].select(
                        group, keys.decode(teacher["key"], group), teacher
                    )
                    for group in space.groups
                ]
            for kind in KINDS:
                targets = self.head(space.name, kind).kept(teacher[kind], kept)
                if self.latent.shuffle_targets:
                    targets = [target.roll(1, dims=0) for target in targets]
                found[kind].append(targets)
        return found

    def _teacher_losses(
        self, batch: Batch, view: StudentOutput, counts: Counts, *, figures: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self.losses.of_kv:
            return {}, {}
        parts, shown = super()._teacher_losses(batch, view, counts, figures=figures)
        if figures:
            shown |= eviction_statistics(batch, self.latent.budget)
        return parts, shown

    def _codi(self, batch: Batch, view: LatentOutput, counts: Counts) -> Tensor:
        """Smooth-L1 of the layers' outputs before the answer (CODI, arXiv 2502.21074).

        Teachers count by their fusion weights, in the layers that they teach.
        """
        teaches_N1L1 = self.weigh.get_buffer("serves")
        serves_NBLT = teaches_N1L1 & _answered(batch)[:, None, None]
        alpha = replace(self.weigh(batch, None), serves_NBLT=serves_NBLT).alpha()
        errors = []
        for cue_map, space, alpha_BL1 in zip(self.cues, self.teachers, alpha, strict=True):
            compared = cue_map(view.cue_BLE, batch["teachers"][space.name]["cue"])
            errors.append(sum_served(hidden_error(*compared), alpha_BL1[..., 0]))
        num_served = counts["num_samples"].clamp_min(1) * teaches_N1L1.any(0).sum().clamp_min(1)
        return torch.stack(errors).sum() / num_served


class CueMap(nn.Module):
    """Pairs the student's layer outputs with the teacher's, at the teacher's width.

    The learned map goes from student to teacher, so that training cannot move the target.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, teacher: TeacherManifest, depths: list[float]
    ) -> None:
        super().__init__()
        width = teacher.hidden_size
        num_maps = 0 if width == hidden_size else num_layers
        self.widen = nn.ModuleList(nn.Linear(hidden_size, width) for _ in range(num_maps))
        # Stored are the kept layers' inputs and the final output: row i + 1 is layer i's output.
        stored = sorted(teacher.layers)
        nearest = [min(range(len(stored)), key=lambda i: abs(stored[i] - d)) for d in depths]
        self.rows = [i + 1 for i in nearest[:-1]] + [len(stored)]

    def forward(self, student_BLE: Tensor, stored_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of both, ``[B, L_s, E_t]``; the last layer's is the final output."""
        if len(self.widen):
            layers = zip(self.widen, student_BLE.unbind(1), strict=True)
            student_BLE = torch.stack([widen(x) for widen, x in layers], 1)
        return student_BLE, stored_BLE[:, self.rows]


def eviction_statistics(batch: Batch, budget: int) -> dict[str, Tensor]:
    """Share of samples whose rationale exceeds the budget, and share of evicted tokens."""
    masks = [teacher["rationale"] for teacher in batch["teachers"].values()]
    lengths = torch.cat([mask.sum(1) for mask in masks])
    dropped = torch.cat([num_evicted(mask, budget) for mask in masks])
    return {
        "eviction_bites": (dropped > 0).float().mean(),
        "eviction_dropped": dropped.sum() / lengths.sum().clamp_min(1),
    }


def _answered(batch: Batch) -> Tensor:
    """Samples with answer labels, ``[B]``."""
    answered: Tensor = (batch["labels"] != IGNORED_LABEL).any(1)
    return answered
