"""The attention-KL loss inside the distiller: both sides' keys rotated as the student rotates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.config_distill import AlignmentConfig
from kvdistill.distill.alignment import rotate, scale_frequencies
from kvdistill.distill.losses import attention_kl
from kvdistill.distill.objectives import StudentView
from kvdistill.errors import StudentError


class AttentionMaps(nn.Module):
    """KL between the student's attention over the target's keys and over its own."""

    inv_freq: Tensor | None

    def __init__(self, student: Any, config: AlignmentConfig) -> None:
        super().__init__()
        self.config = config
        base = getattr(student, student.base_model_prefix, student)
        rotary = getattr(base, "rotary_emb", None)
        found = getattr(rotary, "inv_freq", None)
        if rotary is not None and found is None:
            raise StudentError(
                f"losses.attention_kl: a student of type {student.config.model_type!r} has a "
                "rotary embedding of its own per layer type; set the loss to 0"
            )
        self.scaling = float(getattr(rotary, "attention_scaling", 1.0))
        self.trained_length = getattr(student.config, "max_position_embeddings", None)
        self.register_buffer("inv_freq", None if found is None else found.clone(), persistent=False)

    def forward(self, view: StudentView, target_k_BLHTD: Tensor, mask_BT: Tensor) -> Tensor:
        """KL per token ``[B, T]``; see ``losses.attention_kl``."""
        query, own, target = view.query_BLQTD, view.key_BLHTD, target_k_BLHTD
        if self.inv_freq is not None:
            length = query.shape[3]
            position_BT = torch.arange(length, device=query.device)[None]
            scaled = scale_frequencies(
                self.inv_freq,
                self.config.rope,
                self.config.rope_factor,
                length,
                self.trained_length,
            )
            query = rotate(query, position_BT, self.inv_freq, attention_scaling=self.scaling)
            own = rotate(own, position_BT, self.inv_freq, attention_scaling=self.scaling)
            if self.config.rope != "none":
                target = rotate(target, position_BT, scaled, attention_scaling=self.scaling)
        return attention_kl(query, own, target, mask_BT)
