"""Latent iteration: from a question to the inputs of the latent positions, and the last pass.

A row is ``[question, bot, latents, eot, answer]``. The question is left-padded and the answer
right-padded, so that the latents occupy the same columns in every sample, and a sample's positions
do not depend on its batch.

``jacobi``      x⁰ = prj(hidden of [bot, latents]) shifted by one; T times: run the latents on the
                question's cache, x ← [x⁰_1 ; prj(h_1 … h_{M−1})] (PCCoT, arXiv 2506.18582)
``sequential``  x_1 = prj(h_bot), x_{j+1} = prj(h_j), one latent at a time (CODI, arXiv 2502.21074)

After t iterations the first t latents equal those of the sequential form, so T = M is that form and
T = 0 is pause tokens (arXiv 2310.02226). Caches are built by concatenation and never written in
place, so gradients flow through all iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from kvdistill.attention.language_head import DeferredLogits, LanguageHead

Project = Callable[[Tensor], Tensor]

Cached = tuple[tuple[Tensor, Tensor], ...]
"""Keys (rotated) and values of every layer, ``[B, H, T, D]``."""


class LatentProjector(nn.Module):
    """Maps a hidden state to the next latent's input (CODI, arXiv 2502.21074).

    Dropout, Linear to ``width``, GELU, Linear, LayerNorm. The norm starts at the scale of the
    model's embeddings: a latent many times larger than any token would dominate the residual
    stream.
    """

    def __init__(self, hidden_size: int, width: int, dropout: float, scale: float) -> None:
        super().__init__()
        norm = nn.LayerNorm(hidden_size)
        nn.init.constant_(norm.weight, scale)
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(hidden_size, width),
            nn.GELU(),
            nn.Linear(width, hidden_size),
            norm,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., E]`` to ``[..., E]``."""
        out: Tensor = self.layers(hidden)
        return out


@dataclass(frozen=True, eq=False)
class Prefix:
    """Question and bot, before the latents."""

    embeds_BTE: Tensor
    mask_BT: Tensor
    """Long; 0 on the left-padding."""
    cached: Cached | None = None
    """Keys and values of the prefix; None before its first pass."""


def jacobi(
    model: Any, project: Project, prefix: Prefix, x_BME: Tensor, iterations: int
) -> tuple[Prefix, Tensor]:
    """Refine all latents in parallel: the prefix with its cache, and inputs ``[B, M, E]``.

    The last of at least one iteration is left to ``conclude``.
    """
    mask = _extended(prefix.mask_BT, x_BME.shape[1])
    first, cache = _run_after_cache(model, torch.cat([prefix.embeds_BTE, x_BME], 1), mask, None)
    cached = _truncated(cache, prefix.mask_BT.shape[1])
    # The hidden state at bot gives the first latent's input, that of a latent the next one's.
    x_BME = project(first.last_hidden_state[:, -x_BME.shape[1] - 1 : -1])
    first_BE = x_BME[:, :1]
    for _ in range(iterations - 1):
        output, _ = _run_after_cache(model, x_BME, mask, cached)
        x_BME = torch.cat([first_BE, project(output.last_hidden_state[:, :-1])], 1)
    return Prefix(prefix.embeds_BTE, prefix.mask_BT, cached), x_BME


def sequential(
    model: Any, project: Project, prefix: Prefix, num_latents: int
) -> tuple[Prefix, Tensor]:
    """Run one latent after the other: the prefix with its cache, and inputs ``[B, M, E]``.

    The last latent is left to ``conclude``.
    """
    first, cache = _run_after_cache(model, prefix.embeds_BTE, prefix.mask_BT, None)
    cached = grown = _truncated(cache, prefix.mask_BT.shape[1])
    inputs = [project(first.last_hidden_state[:, -1:])]
    for latent in range(1, num_latents):
        step, cache = _run_after_cache(model, inputs[-1], _extended(prefix.mask_BT, latent), grown)
        grown = _truncated(cache, prefix.mask_BT.shape[1] + latent)
        inputs.append(project(step.last_hidden_state))
    return Prefix(prefix.embeds_BTE, prefix.mask_BT, cached), torch.cat(inputs, 1)


def conclude(
    head: LanguageHead, prefix: Prefix, x_BME: Tensor, tail_BAE: Tensor, tail_mask_BA: Tensor
) -> tuple[Any, Tensor | DeferredLogits, DynamicCache, Tensor]:
    """Run the latents for the last time, together with the tail (eot and the answer).

    Returns:
        The model's output, whose last ``M + A`` columns are latents and tail; the tail's logits;
        the cache, and its mask.
    """
    embeds = torch.cat([x_BME, tail_BAE], 1)
    if prefix.cached is None:
        embeds = torch.cat([prefix.embeds_BTE, embeds], 1)
    mask = torch.cat([_extended(prefix.mask_BT, x_BME.shape[1]), tail_mask_BA], 1)
    inputs = _after_cache(embeds, mask, prefix.cached)
    columns = tail_BAE.shape[1]
    output, logits = head.run(columns=columns, **inputs, output_hidden_states=True)
    return output, logits, inputs["past_key_values"], mask


def _run_after_cache(
    model: Any, embeds_BTE: Tensor, mask_BT: Tensor, cached: Cached | None
) -> tuple[Any, DynamicCache]:
    """Run the layers alone, without a head; arguments as for ``_after_cache``."""
    inputs = _after_cache(embeds_BTE, mask_BT, cached)
    return model.base_model(**inputs), inputs["past_key_values"]


def _after_cache(embeds_BTE: Tensor, mask_BT: Tensor, cached: Cached | None) -> dict[str, Any]:
    """Inputs that follow the cached positions; the mask covers both, ``[B, cached + T]``."""
    cache = DynamicCache()
    for layer_idx, (key, value) in enumerate(cached or ()):
        cache.update(key, value, layer_idx)
    return {
        "inputs_embeds": embeds_BTE,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -embeds_BTE.shape[1] :],
        "past_key_values": cache,
        "use_cache": True,
    }


def _truncated(cache: DynamicCache, length: int) -> Cached:
    return tuple((layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers)


def _extended(mask_BT: Tensor, columns: int) -> Tensor:
    return F.pad(mask_BT, (0, columns), value=1)
