"""From a hidden state to the input of the next latent position."""

from __future__ import annotations

from torch import Tensor, nn


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
