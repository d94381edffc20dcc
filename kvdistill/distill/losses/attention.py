"""KL between what the student attends to and what it would attend to with the target's keys.

    KL( softmax(q·k_target/√D) ‖ softmax(q·k_student/√D) )

The student's own queries, its own causal mask; only the keys differ. Gradients reach queries and
student keys. One layer's ``T × T`` maps exist at a time: the backward pass makes them again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvdistill.errors import GeometryError


def attention_kl(
    query_BLQTD: Tensor,
    student_k_BLHTD: Tensor,
    target_k_BLHTD: Tensor,
    mask_BT: Tensor,
    causal: bool = True,
) -> Tensor:
    """KL per query token, the mean over layers and query heads: ``[B, T]`` float32.

    Args:
        query_BLQTD: the student's queries; ``Q`` a multiple of H. All three rotated alike.
        student_k_BLHTD: the student's keys.
        target_k_BLHTD: the target's keys in the student's space, detached here.
        mask_BT: tokens whose keys count on both sides; queries elsewhere score 0.
        causal: a query sees itself and what is before it.

    Raises:
        GeometryError: the keys differ in shape, or Q is no multiple of H.
    """
    num_heads, num_queries = student_k_BLHTD.shape[2], query_BLQTD.shape[2]
    if student_k_BLHTD.shape != target_k_BLHTD.shape or num_queries % num_heads:
        raise GeometryError(
            f"attention KL: queries {tuple(query_BLQTD.shape)}, student keys "
            f"{tuple(student_k_BLHTD.shape)}, target keys {tuple(target_k_BLHTD.shape)}; the keys "
            "must agree and query heads be a multiple of KV heads"
        )
    visible = visible_pairs(mask_BT, causal)
    layers = zip(
        query_BLQTD.unbind(1),
        student_k_BLHTD.unbind(1),
        target_k_BLHTD.detach().unbind(1),
        strict=True,
    )
    maps = [
        checkpoint(_layer_kl, q, own, target, visible, use_reentrant=False)
        for q, own, target in layers
    ]
    return torch.stack(maps).mean(0)


def visible_pairs(mask_BT: Tensor, causal: bool) -> Tensor:
    """``[B, T, T]`` bool: which key (last axis) a valid query may look at."""
    num_tokens = mask_BT.shape[1]
    pairs = mask_BT.unsqueeze(2) & mask_BT.unsqueeze(1)
    if causal:
        pairs = pairs & pairs.new_ones(num_tokens, num_tokens).tril()
    return pairs


def masked_kl(target_logits: Tensor, student_logits: Tensor, visible: Tensor) -> Tensor:
    """``KL(softmax(target) ‖ softmax(student))`` over the last axis, 0 for a row that sees nothing.

    Float32; ``visible`` broadcasts against the logits.
    """
    blind = ~visible.any(-1, keepdim=True)
    # A row that sees nothing looks at everything, and is then multiplied away: no NaN to mask.
    hidden = ~(visible | blind)
    log_p = target_logits.float().masked_fill(hidden, -torch.inf).log_softmax(-1)
    log_q = student_logits.float().masked_fill(hidden, -torch.inf).log_softmax(-1)
    gap = torch.where(hidden, 0.0, log_p) - torch.where(hidden, 0.0, log_q)
    return (log_p.exp() * gap).sum(-1) * ~blind.squeeze(-1)


def _layer_kl(query_BQTD: Tensor, own_BHTD: Tensor, target_BHTD: Tensor, visible: Tensor) -> Tensor:
    b, num_heads, num_tokens, dim = own_BHTD.shape
    query = query_BQTD.float().reshape(b, num_heads, -1, num_tokens, dim) * dim**-0.5
    student = query @ own_BHTD.float().unsqueeze(2).mT
    target = query.detach() @ target_BHTD.float().unsqueeze(2).mT
    return masked_kl(target, student, visible[:, None, None]).mean(dim=(1, 2))
