"""R-KV: keep tokens that are attended to and unlike the others.

Two forms go by that name and differ in the sign and the shape of the redundancy term; both are
here, under their own names. Keys are what the attention saw, so rotated ones (``rotate``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_MIX = 0.1
"""λ, the share of importance, in both papers."""


WINDOW = 8


POOL = 7


ALIKE = 0.5


def rkv_score(
    key_BLHTD: Tensor, importance_BLHT: Tensor, mask_BT: Tensor, mix: float = DEFAULT_MIX
) -> Tensor:
    """KaVa's form (arXiv 2510.02312): ``[B, L, H, T]`` float32, larger is kept.

    S = λ·I + (1 − λ)·R,   R = softmax_i( −(1/n) Σ_{j≠i} cos(k_i, k_j) )

    The sum over ``j`` is ``k̂_i · Σ_j k̂_j`` less the token itself: no ``T × T`` matrix.
    """
    valid = mask_BT[:, None, None, :]
    unit = F.normalize(key_BLHTD.float(), dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
    to_all = (unit * unit.sum(3, keepdim=True)).sum(-1) - unit.square().sum(-1)
    count = mask_BT.sum(1).clamp_min(1)[:, None, None, None]
    diversity = _softmax(-to_all / count, valid)
    return mix * importance_BLHT.float() + (1 - mix) * diversity


def rkv_original_score(
    key_BLHTD: Tensor, importance_BLHT: Tensor, mask_BT: Tensor, mix: float = DEFAULT_MIX
) -> Tensor:
    """R-KV's own form (arXiv 2505.24133 and its code): ``[B, L, H, T]``, larger is kept.

    Z = λ·I − (1 − λ)·R,   R_j = softmax_j( (1/n) Σ_i C_ij )

    ``C`` are cosines with a zero diagonal, where every row ``i`` gives up its most recent column
    with ``C_ij > 0.5`` (its first column where there is none, as the released code does), so the
    newest of alike tokens counts as less redundant. ``I`` is max-pooled over 7 neighbours, and
    the last 8 tokens are always kept. Needs ``T × T`` per head; done one layer at a time.
    """
    valid = mask_BT[:, None, None, :]
    rank = mask_BT.long().cumsum(1) - 1
    count = mask_BT.sum(1, keepdim=True)
    window = (mask_BT & (rank >= count - WINDOW))[:, None, None, :]
    past = importance_BLHT.float().masked_fill(~valid | window, 0.0)
    pooled = F.max_pool1d(past.flatten(0, 2), POOL, stride=1, padding=POOL // 2)
    mean = torch.stack(
        [_mean_cosine(key_BHTD, mask_BT) for key_BHTD in key_BLHTD.float().unbind(1)], dim=1
    )
    score = mix * pooled.view(past.shape) - (1 - mix) * _softmax(mean, valid)
    return score.masked_fill(window, torch.inf)


def _mean_cosine(key_BHTD: Tensor, mask_BT: Tensor) -> Tensor:
    num_tokens = mask_BT.shape[1]
    valid = mask_BT[:, None, :]
    unit = F.normalize(key_BHTD, dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    column = torch.arange(num_tokens, device=cosine.device)
    first = mask_BT.int().argmax(1)[:, None, None]
    newest = torch.where(cosine > ALIKE, column, first.unsqueeze(-1)).amax(-1)
    cosine.scatter_(-1, newest.unsqueeze(-1), 0.0)
    return cosine.sum(-2) / mask_BT.sum(1).clamp_min(1)[:, None, None]


def _softmax(logits: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the valid tokens; all zero where there is none."""
    return logits.masked_fill(~valid, -torch.inf).softmax(-1).nan_to_num(0.0)
