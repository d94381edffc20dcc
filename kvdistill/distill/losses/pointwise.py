"""Errors token by token in float32: keys and values, hidden states, next-token cross-entropy."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.attention.language_head import DeferredLogits
from kvdistill.distill.losses.weighting import reduce_tokens
from kvdistill.errors import GeometryError
from kvdistill.types import Distance

IGNORED_LABEL: Final = -100
"""Label of a token that no cross-entropy counts, as in transformers."""


def kv_error(
    student_BLHTD: Tensor,
    target_BLHTD: Tensor,
    distance: Distance = "mse",
    layer_std_L: Tensor | None = None,
) -> Tensor:
    """Error per layer and token, the mean over heads and channels: ``[B, L, T]`` float32.

    Args:
        student_BLHTD: the student's keys (unrotated) or values, or a regression from them.
        target_BLHTD: what they are compared with; not detached here.
        distance: ``mse``, or ``smooth_l1`` (quadratic below an error of 1, linear above).
        layer_std_L: divide each layer's error by the target's std in that layer, detached
            (KaVa, arXiv 2510.02312), where the target is not standardised.

    Raises:
        GeometryError: the shapes differ (they could broadcast silently).
    """
    _check_same_shape(student_BLHTD, target_BLHTD)
    student, target = student_BLHTD.float(), target_BLHTD.float()
    if distance == "mse":
        # As a norm: squares are accumulated in both directions and never materialised.
        norm: Tensor = torch.linalg.vector_norm(student - target, dim=(2, 4))
        error = norm.square() / (student.shape[2] * student.shape[4])
    else:
        error = F.smooth_l1_loss(student, target, reduction="none").mean(dim=(2, 4))
    if layer_std_L is not None:
        error = error / layer_std_L.detach().float().clamp_min(1e-6)[:, None]
    return error


def cosine_error(student_BLHTD: Tensor, target_BLHTD: Tensor) -> Tensor:
    """``1 − cos`` of every head's vector, the mean over heads: ``[B, L, T]`` float32.

    Raises:
        GeometryError: the shapes differ.
    """
    _check_same_shape(student_BLHTD, target_BLHTD)
    cosine = F.cosine_similarity(student_BLHTD.float(), target_BLHTD.float(), dim=-1, eps=1e-6)
    return (1 - cosine).mean(dim=2)


def layer_std(target_BLHTD: Tensor, mask_BLT: Tensor) -> Tensor:
    """Std of each layer's target over the layer's valid tokens: ``[L]`` float32, detached."""
    target = target_BLHTD.detach().float()
    mask = mask_BLT[:, :, None, :, None].to(target.dtype)
    count = mask.sum(dim=(0, 2, 3, 4), keepdim=True) * target.shape[2] * target.shape[4]
    mean = (target * mask).sum(dim=(0, 2, 3, 4), keepdim=True) / count.clamp_min(1)
    square = (target - mean).square() * mask
    return (square.sum(dim=(0, 2, 3, 4)) / count.flatten().clamp_min(1)).sqrt()


def hidden_error(student_BLE: Tensor, target_BLE: Tensor) -> Tensor:
    """CODI: hidden states just before the answer, student against teacher: ``[B, L]`` float32.

    Smooth-L1, the mean over channels divided by the target's std in each layer of this batch
    (CODI, arXiv 2502.21074; used by KaVa, arXiv 2510.02312).

    Args:
        student_BLE: the student's hidden states at the token that predicts the answer, mapped to
            the teacher's width.
        target_BLE: the teacher's (``hidden_at_cue`` of the store), layer-mapped; detached here.
    """
    target = target_BLE.detach().float()
    error = F.smooth_l1_loss(student_BLE.float(), target, reduction="none").mean(2)
    std = target.std(dim=(0, 2), correction=0)
    return error / std.clamp_min(1e-6)


def cross_entropy(
    logits: Tensor | DeferredLogits, labels_BT: Tensor, num_labels: Tensor | None
) -> Tensor:
    """Next-token cross-entropy: a float32 scalar, reduced over the labels that count.

    Args:
        logits: what each token predicts, ``[B, T, V]``.
        labels_BT: token ids, not shifted; ``IGNORED_LABEL`` where they do not count.
        num_labels: ``num_predicted`` of all micro-batches and ranks; this batch's if None.
    """
    # Labels are shifted, not logits: this copies no [B, T, V], and softmax is contiguous.
    wanted = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
    if isinstance(logits, DeferredLogits):
        errors = logits.map(negative_log_likelihood, wanted)
    else:
        errors = negative_log_likelihood(logits.flatten(0, 1), wanted.flatten()).view_as(wanted)
    return reduce_tokens(errors, wanted != IGNORED_LABEL, num_labels)


def negative_log_likelihood(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Of every label, in nats: ``[N]`` float32; 0 where it is ``IGNORED_LABEL``."""
    return F.cross_entropy(
        logits_NV.float(), labels_N, ignore_index=IGNORED_LABEL, reduction="none"
    )


def num_predicted(labels_BT: Tensor) -> Tensor:
    """Number of labels that a preceding token predicts."""
    return (labels_BT[:, 1:] != IGNORED_LABEL).sum()


def share_of_step(labels_BT: Tensor, num_labels: Tensor | None) -> Tensor:
    """Share of a step's ``num_labels`` that are this batch's; 1 if not given.

    Times it, a figure of a batch adds up to the mean over the batches of a step by their labels.
    """
    own = num_predicted(labels_BT)
    return own / (own if num_labels is None else num_labels).clamp_min(1)


def _check_same_shape(student: Tensor, target: Tensor) -> None:
    if student.shape != target.shape:
        raise GeometryError(
            f"loss: student {tuple(student.shape)} and target {tuple(target.shape)} differ; "
            "align and project first ([B, L, H, T, D])"
        )
