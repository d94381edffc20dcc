"""Thinking: from a question to the inputs of the latent positions, and the pass that uses them.

A row is ``[question, bot, latents, eot, answer]``: the question padded on the left, the answer on
the right, so that the latents stand in the same columns for every sample and a sample's positions
do not depend on its batch.

``jacobi``      x⁰ = prj(hidden of [bot, latents]) shifted by one; T times: run the latents on the
                question's cache, x ← [x⁰_1 ; prj(h_1 … h_{M−1})] (PCCoT, arXiv 2506.18582)
``sequential``  x_1 = prj(h_bot), x_{j+1} = prj(h_j), one latent at a time (CODI, arXiv 2502.21074)

After t iterations the first t latents are what the sequential form gives, so T = M is that form
and T = 0 is pause tokens (arXiv 2310.02226). The last run of the latents is joined with the pass
over eot and the answer. Every run starts from the same keys and values of the question: caches
are made anew by concatenation, nothing is changed in place, so gradients flow through all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

Project = Callable[[Tensor], Tensor]


Cached = tuple[tuple[Tensor, Tensor], ...]
"""Keys (rotated) and values of every layer, ``[B, H, T, D]``."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What has been read before the latents; ``cached`` is None where nothing has been run yet."""

    embeds_BTE: Tensor
    """Question and bot."""
    mask_BT: Tensor
    """Long; 0 on padding, which is on the left."""
    cached: Cached | None = None


@dataclass(frozen=True, eq=False)
class LatentPass:
    """One pass: last hidden states of what was put in, and the cache after it."""

    output: Any
    cache: DynamicCache

    @property
    def last_hidden(self) -> Tensor:
        """``[B, T, E]`` of what was put in, after the final norm."""
        hidden: Tensor = self.output.hidden_states[-1]
        return hidden


def run_after_cache(
    model: Any, embeds_BTE: Tensor, mask_BT: Tensor, cached: Cached | None
) -> LatentPass:
    """Run ``embeds`` after what is cached; ``mask`` covers both, ``[B, cached + T]``."""
    position_ids = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -embeds_BTE.shape[1] :]
    cache = DynamicCache()
    for layer_idx, (key, value) in enumerate(cached or ()):
        cache.update(key, value, layer_idx)
    output = model(
        inputs_embeds=embeds_BTE,
        attention_mask=mask_BT,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    )
    return LatentPass(output, cache)


def pause(prefix: Prefix, latents_ME: Tensor) -> tuple[Prefix, Tensor]:
    """Latents that are the same for every question; nothing needs to run before the answer."""
    return prefix, latents_ME.expand(prefix.embeds_BTE.shape[0], -1, -1)


def jacobi(
    model: Any, project: Project, prefix: Prefix, latents_ME: Tensor, iterations: int
) -> tuple[Prefix, Tensor]:
    """All latents at once, refined ``iterations`` times: the cached question, ``x [B, M, E]``.

    The last of the iterations is left to the pass that goes on to the answer.
    """
    prefix, x_BME = pause(prefix, latents_ME)
    if not iterations:
        return prefix, x_BME
    num_latents = x_BME.shape[1]
    first = run_after_cache(
        model, torch.cat([prefix.embeds_BTE, x_BME], 1), _longer(prefix.mask_BT, num_latents), None
    )
    cached = truncate_cache(first.cache, prefix.mask_BT.shape[1])
    # The hidden state at bot gives the first latent's input, that of a latent the next one's.
    shifted = first.last_hidden[:, -num_latents - 1 : -1]
    x_BME = project(shifted)
    first_BE = x_BME[:, :1]
    for _ in range(iterations - 1):
        hidden = run_after_cache(
            model, x_BME, _longer(prefix.mask_BT, num_latents), cached
        ).last_hidden
        x_BME = torch.cat([first_BE, project(hidden[:, :-1])], 1)
    return Prefix(prefix.embeds_BTE, prefix.mask_BT, cached), x_BME


def sequential(
    model: Any, project: Project, prefix: Prefix, num_latents: int
) -> tuple[Prefix, Tensor]:
    """One latent after the other: the cached question, ``x [B, M, E]``.

    The last latent is left to the pass that goes on to the answer.
    """
    first = run_after_cache(model, prefix.embeds_BTE, prefix.mask_BT, None)
    cached = grown = truncate_cache(first.cache, prefix.mask_BT.shape[1])
    inputs = [project(first.last_hidden[:, -1:])]
    for latent in range(1, num_latents):
        step = run_after_cache(model, inputs[-1], _longer(prefix.mask_BT, latent), grown)
        grown = truncate_cache(step.cache, prefix.mask_BT.shape[1] + latent)
        inputs.append(project(step.last_hidden))
    return Prefix(prefix.embeds_BTE, prefix.mask_BT, cached), torch.cat(inputs, 1)


def conclude(
    model: Any, prefix: Prefix, x_BME: Tensor, tail_BAE: Tensor, tail_mask_BA: Tensor
) -> tuple[LatentPass, Tensor]:
    """The last run of the latents, going on to eot and the answer; and the mask of all of it.

    The outputs' last ``M + A`` columns are latents and tail, whatever came before.
    """
    embeds = torch.cat([x_BME, tail_BAE], 1)
    if prefix.cached is None:
        embeds = torch.cat([prefix.embeds_BTE, embeds], 1)
    mask = torch.cat([_longer(prefix.mask_BT, x_BME.shape[1]), tail_mask_BA], 1)
    return run_after_cache(model, embeds, mask, prefix.cached), mask


def truncate_cache(cache: DynamicCache, length: int) -> Cached:
    """The first ``length`` positions of a cache."""
    return tuple((layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers)


def _longer(mask_BT: Tensor, columns: int) -> Tensor:
    return F.pad(mask_BT, (0, columns), value=1)


class LatentProjector(nn.Module):
    """Dropout, Linear → width, GELU, Linear, LayerNorm (CODI, arXiv 2502.21074).

    The norm starts at the scale of the model's own embeddings: a latent that enters the residual
    stream many times larger than any token would drown what the layers add to it.
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


# MERGED-DOC distill.latent.projector
# From a hidden state to the input of the next latent position.
