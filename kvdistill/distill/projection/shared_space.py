"""One latent KV space for every model: two adapters a model instead of one per pair.

Every teacher and the student map into the space, losses are taken there, and the inverse adapter
brings fused latents back into the student (KV Cache Alignment, arXiv 2601.06123). A space that
is trained by its own distances alone collapses to a point: ``round_trip_error`` and a language
model's loss through ``out_of`` are what keep it honest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvdistill.distill.losses.distance import kv_error
from kvdistill.distill.projection.initial import orthogonal
from kvdistill.distill.projection.layerwise import layerwise
from kvdistill.distill.projection.shapes import HeadShape, check_kv


class SpaceAdapter(nn.Module):
    """One model's way into the shared space and back, per layer and for one kind.

    Both maps are linear; ``back`` starts as the transpose of ``to``, its pseudo-inverse.
    """

    def __init__(self, num_layers: int, model: HeadShape, space: HeadShape) -> None:
        super().__init__()
        self.num_layers, self.model, self.space = num_layers, model, space
        to = torch.stack([orthogonal(model.width, space.width) for _ in range(num_layers)])
        self.to_LIO = nn.Parameter(to)
        self.back_LOI = nn.Parameter(to.mT.contiguous())
        self.to_bias_LO = nn.Parameter(torch.zeros(num_layers, space.width))
        self.back_bias_LI = nn.Parameter(torch.zeros(num_layers, model.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """The model's KV ``[B, L, H, T, D]`` in the shared space, ``[B, L, H_z, T, D_z]``.

        Raises:
            GeometryError: layers, heads or dim are not the model's.
        """
        check_kv(x_BLHTD, self.num_layers, self.model, "shared space")
        return layerwise(x_BLHTD, self.to_LIO, self.to_bias_LO, self.space)

    def out_of(self, z_BLHTD: Tensor) -> Tensor:
        """Latents ``[B, L, H_z, T, D_z]`` as the model's KV, ``[B, L, H, T, D]``.

        Raises:
            GeometryError: layers, heads or dim are not the space's.
        """
        check_kv(z_BLHTD, self.num_layers, self.space, "shared space")
        return layerwise(z_BLHTD, self.back_LOI, self.back_bias_LI, self.model)

    def round_trip_error(self, x_BLHTD: Tensor) -> Tensor:
        """What a model loses by going into the space and back: ``[B, T]`` float32."""
        return kv_error(self.out_of(self(x_BLHTD)), x_BLHTD)
