"""KL between rows of ``T × T`` maps: what a token attends to, and how tokens relate to each other.

    attention   KL( softmax(q·k_target/√D) ‖ softmax(q·k_student/√D) )
                the student's own queries and causal mask; only the keys differ
    relation    KL( softmax(X_t X_tᵀ/√d) ‖ softmax(X_s X_sᵀ/√d) )
                X: a layer's keys (K-K) or values (V-V), all heads joined and split again into
                relation heads of width d (MiniLMv2, arXiv 2012.15828). Heads and dim need not
                match, so no projector is needed that could absorb the loss

Only one layer's maps exist at a time: the backward pass recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvdistill.attention.rotary import rotate_layers, scale_frequencies
from kvdistill.config.distill import AlignmentConfig
from kvdistill.errors import GeometryError, StudentError


class AttentionMaps(nn.Module):
    """``attention_kl`` of unrotated queries and keys, which are rotated as the student does."""

    inv_freq: Tensor | None

    def __init__(self, student: Any, config: AlignmentConfig) -> None:
        super().__init__()
        self.config = config
        base = getattr(student, student.base_model_prefix, student)
        rotary = getattr(base, "rotary_emb", None)
        found = getattr(rotary, "inv_freq", None)
        if rotary is not None and found is None:
            raise StudentError(
                f"losses.attention_kl: a student of type {student.config.model_type!r} has one "
                "rotary embedding per layer type, which this loss does not support; set it to 0"
            )
        self.scaling = float(getattr(rotary, "attention_scaling", 1.0))
        self.trained_length = getattr(student.config, "max_position_embeddings", None)
        self.register_buffer("inv_freq", None if found is None else found.clone(), persistent=False)

    def forward(
        self, query_BLQTD: Tensor, own_BLHTD: Tensor, target_BLHTD: Tensor, mask_BLT: Tensor
    ) -> Tensor:
        """KL per query ``[B, L, T]`` float32; arguments as ``attention_kl``, not rotated."""
        query, own, target = query_BLQTD, own_BLHTD, target_BLHTD
        if self.inv_freq is not None:
            length, config = query.shape[3], self.config
            scaled = scale_frequencies(
                self.inv_freq, config.rope, config.rope_factor, length, self.trained_length
            )
            rotate = partial(
                rotate_layers,
                position_BT=torch.arange(length, device=query.device)[None],
                attention_scaling=self.scaling,
            )
            query, own = (rotate(x, inv_freq=self.inv_freq) for x in (query, own))
            if config.rope != "none":
                target = rotate(target, inv_freq=scaled)
        return attention_kl(query, own, target, mask_BLT)


def attention_kl(
    query_BLQTD: Tensor, student_k_BLHTD: Tensor, target_k_BLHTD: Tensor, mask_BLT: Tensor
) -> Tensor:
    """KL per layer and query token, the mean over query heads: ``[B, L, T]`` float32.

    Args:
        query_BLQTD: the student's queries, ``Q`` a multiple of H. All three are rotated.
        student_k_BLHTD: the student's keys.
        target_k_BLHTD: the target's keys in the student's space, detached here.
        mask_BLT: tokens whose keys count on both sides of a layer; other queries score 0.
    """
    tensors = query_BLQTD, student_k_BLHTD, target_k_BLHTD.detach()
    return _by_layer(_attention_layer, *tensors, mask_BLT)


def _attention_layer(
    query_BQTD: Tensor, own_BHTD: Tensor, target_BHTD: Tensor, mask_BT: Tensor
) -> Tensor:
    visible = _valid_pairs(mask_BT).tril()
    b, num_heads, num_tokens, dim = own_BHTD.shape
    query = query_BQTD.float().reshape(b, num_heads, -1, num_tokens, dim) * dim**-0.5
    student = query @ own_BHTD.float().unsqueeze(2).mT
    target = query.detach() @ target_BHTD.float().unsqueeze(2).mT
    return masked_kl(target, student, visible[:, None, None]).mean(dim=(1, 2))


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
