"""KL between rows of ``T × T`` maps: what a token attends to, and how tokens relate to each other.

    attention   KL( P(q, k_target) ‖ P(q, k_student) )
                P: the student's own attention, with its queries, rotation, scale, window, soft cap,
                bias and sinks (``attention/attention_rule.py``); only the keys differ
    relation    KL( softmax(X_t X_tᵀ/√d) ‖ softmax(X_s X_sᵀ/√d) )
                X: a layer's keys (K-K) or values (V-V), all heads joined and split again into
                relation heads of width d (MiniLMv2, arXiv 2012.15828). Heads and dim need not
                match, so no projector is needed that could absorb the loss

Only one layer's maps exist at a time: the backward pass recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kvdistill.attention.attention_rule import AttentionRule, unexplained, with_sink
from kvdistill.attention.kv_capture import verify_student
from kvdistill.attention.rotary import scale_frequencies
from kvdistill.config.distill import AlignmentConfig
from kvdistill.errors import GeometryError, StudentError
from kvdistill.store.manifest import RotarySpec


class LayerAttention(NamedTuple):
    """Attention of one layer of the student."""

    rule: AttentionRule
    target_rule: AttentionRule
    """The same, with the rotation of the target's keys."""
    sinks_Q: Tensor | None = None
    """The score of each query head's sink; None without one."""


class AttentionMaps:
    """``attention_kl`` with the student's own attention, as measured on the student in hand."""

    def __init__(self, student: Any, config: AlignmentConfig) -> None:
        verified = verify_student(student)
        problem = unexplained(verified.layers, student.dtype)
        if problem:
            raise StudentError(
                f"losses.attention_kl cannot be computed for a student of type "
                f"{student.config.model_type!r}, because {problem}; set it to 0"
            )
        self.rules: Sequence[AttentionRule] = verified.layers
        positions = getattr(student.config.get_text_config(), "max_position_embeddings", None)
        self.target_rules = [
            replace(rule, rotary=rule.rotary and _stretched(rule.rotary, config, positions))
            for rule in self.rules
        ]
        # Not the parameters themselves, which sharding replaces.
        self._attentions = [site.attention for site in verified.sites]

    def __call__(
        self, query_BLQTD: Tensor, own_BLHTD: Tensor, target_BLHTD: Tensor, mask_BLT: Tensor
    ) -> Tensor:
        """KL per query ``[B, L, T]`` float32; arguments as ``attention_kl``."""
        tensors = query_BLQTD, own_BLHTD, target_BLHTD, mask_BLT
        rules = [
            LayerAttention(rule, target_rule, self._sinks(layer))
            for layer, (rule, target_rule) in enumerate(
                zip(self.rules, self.target_rules, strict=True)
            )
        ]
        return attention_kl(*tensors, rules)

    def _sinks(self, layer: int) -> Tensor | None:
        name = self.rules[layer].sinks
        found = None if name is None else getattr(self._attentions[layer], name)
        return found.full_tensor() if isinstance(found, DTensor) else found


def _stretched(
    rotary: RotarySpec, config: AlignmentConfig, trained_length: int | None
) -> RotarySpec | None:
    """The rotation of target keys by ``alignment.rope``."""
    method, factor = config.rope, config.rope_factor
    if method == "none":
        return None
    if method == "dynamic":
        scale_frequencies(torch.ones(2), method, factor, 1, trained_length)  # refuses bad settings
        stretch = {"dynamic_factor": factor, "trained_length": trained_length}
        return rotary.model_copy(update=stretch)
    known = {"inv_freq": rotary.inv_freq, "long_inv_freq": rotary.long_inv_freq}
    return rotary.model_copy(
        update={
            name: tuple(scale_frequencies(torch.tensor(x), method, factor).tolist())
            for name, x in known.items()
            if x is not None
        }
    )


def attention_kl(
    query_BLQTD: Tensor,
    student_k_BLHTD: Tensor,
    target_k_BLHTD: Tensor,
    mask_BLT: Tensor,
    layers: Sequence[LayerAttention],
) -> Tensor:
    """KL per layer and query token, the mean over query heads: ``[B, L, T]`` float32.

    Args:
        query_BLQTD: the student's queries, ``Q`` a multiple of H. All three are unrotated.
        student_k_BLHTD: the student's keys.
        target_k_BLHTD: the target's keys in the student's space, detached here.
        mask_BLT: tokens whose keys count on both sides of a layer; other queries score 0.
        layers: the student's attention, by layer.
    """
    tensors = query_BLQTD, student_k_BLHTD, target_k_BLHTD.detach(), mask_BLT
    rows = zip(*(x.unbind(1) for x in tensors), layers, strict=True)
    maps = [checkpoint(_attention_layer, *row, use_reentrant=False) for row in rows]
    return torch.stack(maps, dim=1)


def _attention_layer(
    query_BQTD: Tensor,
    own_BHTD: Tensor,
    target_BHTD: Tensor,
    mask_BT: Tensor,
    layer: LayerAttention,
) -> Tensor:
    rule, target_rule, sinks_Q = layer
    length = mask_BT.shape[1]
    place = torch.arange(length, device=mask_BT.device)
    query = rule.rotated(query_BQTD, place, length)
    own = rule.rotated(own_BHTD, place, length)
    target = target_rule.rotated(target_BHTD, place, length)
    visible = (_valid_pairs(mask_BT) & rule.mask.visible(place, place))[:, None, None]
    ours = rule.scores(query, own, place, place, length)
    theirs = rule.scores(query.detach(), target, place, place, length)
    ours, seen = with_sink(ours, visible, sinks_Q)
    theirs, _ = with_sink(theirs, visible, None if sinks_Q is None else sinks_Q.detach())
    return masked_kl(theirs, ours, seen).mean(dim=(1, 2))


def relation_error(
    student_BLHTD: Tensor, teacher_BLHTD: Tensor, mask_BLT: Tensor, num_relations: int
) -> Tensor:
    """KL of relation rows per layer and token, the mean over relation heads: ``[B, L, T]`` float32.

    Args:
        student_BLHTD: the student's keys or values.
        teacher_BLHTD: the teacher's of the same kind, aligned, layer-mapped, detached here;
            heads and dim may differ.
        mask_BLT: tokens that take part in a layer's relations; other rows score 0.
        num_relations: relation heads; must divide ``H·D`` of both.

    Raises:
        GeometryError: samples, layers or tokens differ, or the widths cannot be split.
    """
    ours, theirs = student_BLHTD.shape, teacher_BLHTD.shape
    uneven = (ours[2] * ours[4]) % num_relations or (theirs[2] * theirs[4]) % num_relations
    if (ours[0], ours[1], ours[3]) != (theirs[0], theirs[1], theirs[3]) or uneven:
        raise GeometryError(
            f"relation loss: student {tuple(ours)} and teacher {tuple(theirs)} must share B, L "
            f"and T, and H·D of both be a multiple of {num_relations} relation heads"
        )
    layer_kl = partial(_relation_layer, num_relations=num_relations)
    return _by_layer(layer_kl, student_BLHTD, teacher_BLHTD.detach(), mask_BLT)


def _relation_layer(
    own_BHTD: Tensor, teacher_BHTD: Tensor, mask_BT: Tensor, num_relations: int
) -> Tensor:
    logits_BRTT = []
    for x_BHTD in (own_BHTD, teacher_BHTD):
        joined = x_BHTD.float().transpose(1, 2)
        x = joined.reshape(*joined.shape[:2], num_relations, -1).transpose(1, 2)
        logits_BRTT.append((x * x.shape[-1] ** -0.5) @ x.mT)
    student, teacher = logits_BRTT
    return masked_kl(teacher, student, _valid_pairs(mask_BT).unsqueeze(1)).mean(1)


def _by_layer(layer_kl: Callable[..., Tensor], *tensors_BL: Tensor) -> Tensor:
    """``layer_kl`` of every layer ``[B, L, T]``, each recomputed in the backward pass."""
    layers = zip(*(x.unbind(1) for x in tensors_BL), strict=True)
    return torch.stack([checkpoint(layer_kl, *x, use_reentrant=False) for x in layers], dim=1)


def _valid_pairs(mask_BT: Tensor) -> Tensor:
    """``[B, T, T]`` bool: pairs of valid tokens."""
    return mask_BT.unsqueeze(2) & mask_BT.unsqueeze(1)


def masked_kl(target_logits: Tensor, student_logits: Tensor, visible: Tensor) -> Tensor:
    """``KL(softmax(target) ‖ softmax(student))`` over the last axis, float32.

    0 for a row without a visible column; ``visible`` broadcasts against the logits.
    """
    blind = ~visible.any(-1, keepdim=True)
    # A row that sees nothing attends to everything and is then multiplied by zero: no NaN arises.
    hidden = ~(visible | blind)
    log_p = target_logits.float().masked_fill(hidden, -torch.inf).log_softmax(-1)
    log_q = student_logits.float().masked_fill(hidden, -torch.inf).log_softmax(-1)
    gap = torch.where(hidden, 0.0, log_p) - torch.where(hidden, 0.0, log_q)
    return (log_p.exp() * gap).sum(-1) * ~blind.squeeze(-1)
