"""KL divergence between what teachers predicted and what the student predicts.

A teacher's k most likely tokens and the log of the others' mass are a distribution over k + 1
events, and the student's probabilities are summed to the same events:

    KL(p ‖ q) = Σ_k p_k (log p_k − log q_k) + p_rest (log p_rest − log q_rest)

At most the divergence over the whole vocabulary, and equal to it where k is its size. At another
temperature, which the others' mass does not allow, both are renormalised over the k tokens, and the
result is multiplied by its square (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.attention.language_head import DeferredLogits
from kvdistill.distill.fuse.weights import renormalise
from kvdistill.distill.losses.pointwise import IGNORED_LABEL

IMPOSSIBLE: Final = -1e4
"""In place of the log of zero, whose gradient is not finite."""

Predictions = Mapping[str, Tensor]
"""As ``Vocabulary.predictions`` returns them."""


def divergence(logits_NV: Tensor, predicted: Predictions, temperature: float = 1.0) -> Tensor:
    """``KL(teacher ‖ student)`` of every token, in nats: ``[N]`` float32.

    Args:
        logits_NV: of the student.
        predicted: ``ids`` (-1 where there is none) and ``logprob`` ``[N, k]``, ``rest [N]``.
        temperature: of both distributions.
    """
    ids, logprob = predicted["ids"], predicted["logprob"]
    ours, known = logits_NV.float().log_softmax(-1), ids >= 0
    chosen = ours.gather(1, ids.clamp_min(0))
    if temperature != 1.0:
        p, q = (
            torch.where(known, x / temperature, IMPOSSIBLE).log_softmax(-1)
            for x in (logprob, chosen)
        )
        return temperature**2 * torch.where(known, p.exp() * (p - q), 0.0).sum(-1)
    vocabulary = ours.shape[1]
    taken = ids.new_zeros(len(ids), vocabulary + 1, dtype=torch.bool)
    taken.scatter_(1, torch.where(known, ids, vocabulary), True)
    others = ours.masked_fill(taken[:, :vocabulary], IMPOSSIBLE).logsumexp(-1)
    rest = predicted["rest"]
    of_known = torch.where(known, logprob.exp() * (logprob - chosen), 0.0).sum(-1)
    return of_known + rest.exp() * (rest.clamp_min(IMPOSSIBLE) - others)


@dataclass(frozen=True)
class LogitLoss:
    """The teachers' divergences from the student, weighted as their keys and values are."""

    names: Sequence[str]
    """Of the teachers, in the order of the weights."""
    temperature: float

    def where(self, batch: Mapping[str, Any], serves_NBLT: Tensor) -> Tensor:
        """Where each teacher's prediction of a token counts, ``[N, B, T]`` bool."""
        absent = torch.zeros_like(serves_NBLT[0, :, 0])
        found = [self._of(batch, name).get("mask", absent) for name in self.names]
        learned_BT = batch["labels"] != IGNORED_LABEL
        where_NBT = torch.stack(found) & serves_NBLT.any(2) & learned_BT
        return F.pad(where_NBT[..., 1:], (1, 0))  # nothing predicts the first token

    def count(self, batch: Mapping[str, Any], serves_NBLT: Tensor) -> dict[str, Tensor]:
        """``num_predictions``: tokens that any teacher's stored logits predict."""
        return {"num_predictions": self.where(batch, serves_NBLT).any(0).sum()}

    def __call__(
        self,
        logits: Tensor | DeferredLogits,
        batch: Mapping[str, Any],
        alpha_NBLT: Tensor,
        serves_NBLT: Tensor,
    ) -> Tensor:
        """Sum of the divergences over tokens: a float32 scalar.

        Args:
            logits: the student's, ``[B, T, V]``.
            batch: as ``Collate`` makes it.
            alpha_NBLT: fusion weights. A token's are the mean over layers, redistributed among
                the teachers that predicted it.
            serves_NBLT: where teachers serve.
        """
        where_NBLT = self.where(batch, serves_NBLT)[:, :, None]
        weight_NBLT = renormalise(alpha_NBLT.float().mean(2, keepdim=True), where_NBLT)
        parts = [
            (_shifted(weight_BLT[:, 0]), {key: _shifted(x) for key, x in predicted.items()})
            for weight_BLT, name in zip(weight_NBLT, self.names, strict=True)
            if (predicted := self._of(batch, name))
        ]

        def of_rows(logits_NV: Tensor, rows_N: Tensor) -> Tensor:
            errors = []
            for weight, predicted in parts:
                chosen = {key: x[rows_N] for key, x in predicted.items()}
                errors.append(weight[rows_N] * divergence(logits_NV, chosen, self.temperature))
            return torch.stack(errors).sum(0)

        rows_BT = torch.arange(where_NBLT[0].numel(), device=alpha_NBLT.device)
        if isinstance(logits, DeferredLogits):
            return logits.map(of_rows, rows_BT.view(where_NBLT.shape[1], -1)).sum()
        return of_rows(logits.flatten(0, 1), rows_BT).sum()

    def _of(self, batch: Mapping[str, Any], name: str) -> Predictions:
        found: Predictions = batch["teachers"][name].get("predictions", {})
        return found


def _shifted(x_BT: Tensor) -> Tensor:
    """``[B·T, …]``, with each token where the logits are that predict it: one place earlier."""
    return torch.cat([x_BT[:, 1:], torch.zeros_like(x_BT[:, :1])], dim=1).flatten(0, 1)
