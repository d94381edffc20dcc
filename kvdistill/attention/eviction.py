"""Eviction: which teacher tokens are kept when the budget is smaller than the text.

Everything is derived on the device from what the store holds (keys, importance), so another
budget, λ or method needs no new extraction. Every method ranks the valid tokens of each sample,
layer and head; the ``M`` best are returned *in time order*. Where a text has fewer than ``M``
tokens, the rest is masked. Equal scores keep the earlier token.

R-KV keeps tokens that are attended to and unlike the others. Two forms go by that name and differ
in the sign and the shape of the redundancy term; both are here. ``random`` and ``uniform`` are the
baselines: an independent reproduction at GPT-2 scale found R-KV 13.89, random 13.40 and no
distillation 13.19, so a claim for a method needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.errors import ConfigError, GeometryError
from kvdistill.types import EvictionMethod

DEFAULT_MIX: Final = 0.1
"""λ, the share of importance, in both R-KV papers."""
WINDOW, POOL, ALIKE = 8, 7, 0.5
"""R-KV's own constants: last tokens that are kept, neighbours pooled, cosine of alike tokens."""


@dataclass(frozen=True)
class Eviction:
    """``index_BLHM`` long, ascending where ``mask_BLHM`` (bool) is True, in range everywhere."""

    index_BLHM: Tensor
    mask_BLHM: Tensor

    @property
    def covered(self) -> Tensor:
        """Which of the ``M`` positions hold a token: bool ``[B, M]``, the same in every head."""
        return self.mask_BLHM[:, 0, 0]

    def padded(self, num_slots: int) -> Eviction:
        """Padded at the end with masked slots to ``num_slots``."""
        more = (0, num_slots - self.index_BLHM.shape[-1])
        return Eviction(F.pad(self.index_BLHM, more), F.pad(self.mask_BLHM, more))

    def keep(self, x_BLHTD: Tensor) -> Tensor:
        """The kept tokens of keys or values: ``[B, L, H, M, D]``, zero where masked."""
        index = self.index_BLHM.unsqueeze(-1)
        if x_BLHTD.shape[3] == 0:
            return x_BLHTD.new_zeros(*index.shape[:-1], x_BLHTD.shape[-1])
        kept = x_BLHTD.gather(3, index.expand(*index.shape[:-1], x_BLHTD.shape[-1]))
        return kept.masked_fill(~self.mask_BLHM.unsqueeze(-1), 0.0)


def evict(
    method: EvictionMethod,
    mask_BT: Tensor,
    num_layers: int,
    num_heads: int,
    budget: int,
    *,
    key_BLHTD: Tensor | None = None,
    importance_BLHT: Tensor | None = None,
    mix: float = DEFAULT_MIX,
    seed_B: Tensor | None = None,
) -> Eviction:
    """Choose ``budget`` tokens per sample, layer and KV head.

    Args:
        method: ``full`` keeps all (``M = T``); ``right_crop`` the first ``M`` (KaVa's "crop");
            ``uniform`` ``M`` evenly spaced; ``random`` any ``M``; ``importance`` those that
            receive most attention; ``rkv``, ``rkv_original``: by ``rkv_score``,
            ``rkv_original_score``.
        mask_BT: True for the tokens to choose from, such as the rationale's.
        num_layers: L of the result.
        num_heads: KV heads H of the result.
        budget: ``M``.
        key_BLHTD: *rotated* keys, for the R-KV methods, whose papers score what attention sees.
        importance_BLHT: attention received, for ``importance`` and the R-KV methods.
        mix: λ of the R-KV methods.
        seed_B: one integer per sample, for ``random``: a sample's choice depends on nothing else.

    Raises:
        ConfigError: the budget is not positive, or an input that the method ranks by is missing.
        GeometryError: keys or importance differ in samples, layers, heads or tokens.
    """
    if budget < 1:
        raise ConfigError(f"eviction.budget: expected at least 1 token, got {budget}")
    shape = (mask_BT.shape[0], num_layers, num_heads, mask_BT.shape[1])
    for name, given in (("key", key_BLHTD), ("importance", importance_BLHT)):
        if given is not None and tuple(given.shape[:4]) != shape:
            raise GeometryError(
                f"eviction: expected {name} [B, L, H, T] = {shape}, got {tuple(given.shape)}"
            )
    rank_BT = mask_BT.long().cumsum(1) - 1
    if mask_BT.shape[1] == 0:
        score = rank_BT.float()
    elif method == "full":
        score, budget = -rank_BT.float(), mask_BT.shape[1]
    elif method == "right_crop":
        score = -rank_BT.float()
    elif method == "uniform":
        score = _uniform(rank_BT, mask_BT, budget)
    elif method == "random":
        score = _random(_needed(seed_B, method, "seed_B"), shape)
    else:
        score = _needed(importance_BLHT, method, "importance_BLHT").float()
        if method != "importance":
            rkv = rkv_score if method == "rkv" else rkv_original_score
            score = rkv(_needed(key_BLHTD, method, "key_BLHTD"), score, mask_BT, mix)
    if score.dim() == 2:
        score = score[:, None, None, :]
    return _keep_best(score.expand(shape), mask_BT, budget)


def num_evicted(mask_BT: Tensor, budget: int) -> Tensor:
    """Number of tokens of each sample that exceed the budget: long ``[B]``."""
    return (mask_BT.sum(1) - budget).clamp_min(0)


def _uniform(rank_BT: Tensor, mask_BT: Tensor, budget: int) -> Tensor:
    """1 for the middle token of each of ``budget`` equal intervals, else 0; integer arithmetic."""
    count = mask_BT.sum(1, keepdim=True)
    bins = torch.arange(budget, device=mask_BT.device)
    middle = torch.where(count > budget, (2 * bins + 1) * count // (2 * budget), bins)
    chosen = torch.zeros(mask_BT.shape[0], mask_BT.shape[1] + budget, device=mask_BT.device)
    chosen.scatter_(1, middle, 1.0)
    return chosen.gather(1, rank_BT.clamp_min(0))


def _random(seed_B: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Uniform noise, a pure function of (seed, layer, head, token); mixed as splitmix64 does."""
    _, num_layers, num_heads, num_tokens = shape
    token = torch.arange(num_tokens, device=seed_B.device)
    head = torch.arange(num_layers * num_heads, device=seed_B.device)
    counter = (head[:, None] << 32) + token + 1
    x = (seed_B.long()[:, None, None] + 1) * -7046029254386353131 + counter * -7723592293110705685
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift)) * factor
    return ((x ^ (x >> 31)) & 0xFFFFFF).float().view(shape)


def _keep_best(score_BLHT: Tensor, mask_BT: Tensor, budget: int) -> Eviction:
    """The ``budget`` best valid tokens, in time order."""
    num_tokens = mask_BT.shape[1]
    valid = mask_BT[:, None, None, :].expand(score_BLHT.shape)
    score = score_BLHT.masked_fill(~valid, -torch.inf)
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :budget]
    best = torch.where(valid.gather(-1, best), best, num_tokens).sort(dim=-1).values
    best = F.pad(best, (0, budget - best.shape[-1]), value=num_tokens)
    return Eviction(best.clamp_max(max(num_tokens - 1, 0)), best < num_tokens)


def _needed(given: Tensor | None, method: str, name: str) -> Tensor:
    if given is None:
        raise ConfigError(f"eviction.method {method!r} needs {name}; extract it, or use uniform")
    return given


def rkv_score(
    key_BLHTD: Tensor, importance_BLHT: Tensor, mask_BT: Tensor, mix: float = DEFAULT_MIX
) -> Tensor:
    """KaVa's form (arXiv 2510.02312): ``[B, L, H, T]`` float32, larger is kept.

    S = λ·I + (1 − λ)·R,   R = softmax_i( −(1/n) Σ_{j≠i} cos(k_i, k_j) )

    The sum over ``j`` is ``k̂_i · Σ_j k̂_j`` minus the token's own term: no ``T × T`` matrix.
    """
    valid = mask_BT[:, None, None, :]
    unit = F.normalize(key_BLHTD.float(), dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
    to_all = (unit * unit.sum(3, keepdim=True)).sum(-1) - unit.square().sum(-1)
    count = mask_BT.sum(1).clamp_min(1)[:, None, None, None]
    diversity = _masked_softmax(-to_all / count, valid)
    return mix * importance_BLHT.float() + (1 - mix) * diversity


def rkv_original_score(
    key_BLHTD: Tensor, importance_BLHT: Tensor, mask_BT: Tensor, mix: float = DEFAULT_MIX
) -> Tensor:
    """R-KV's own form (arXiv 2505.24133 and its code): ``[B, L, H, T]``, larger is kept.

    Z = λ·I − (1 − λ)·R,   R_j = softmax_j( (1/n) Σ_i C_ij )

    ``C`` are cosines with a zero diagonal. In every row ``i``, the most recent column with
    ``C_ij > 0.5`` is set to zero as well (the first column where there is none, as in the released
    code), so the newest of alike tokens counts as less redundant. ``I`` is max-pooled over 7
    neighbours; the last 8 tokens are always kept. Needs ``T × T`` per head, one layer at a time.
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
    score = mix * pooled.view(past.shape) - (1 - mix) * _masked_softmax(mean, valid)
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


def _masked_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the valid tokens; all zero where there is none."""
    return logits.masked_fill(~valid, -torch.inf).softmax(-1).nan_to_num(0.0)
