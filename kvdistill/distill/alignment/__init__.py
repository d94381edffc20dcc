"""Alignment: which teacher positions and layers a student position and layer is compared with."""

from kvdistill.distill.alignment.band import Bags, Band, apply_band, bags_of
from kvdistill.distill.alignment.cka import linear_cka, monotone_map
from kvdistill.distill.alignment.groups import GroupMap, by_group
from kvdistill.distill.alignment.layers import LayerMap, layer_map
from kvdistill.distill.alignment.quality import AlignmentQuality, quality
from kvdistill.distill.alignment.rope import inverse_frequencies, rotate, scale_frequencies
from kvdistill.distill.alignment.spans import Spans
from kvdistill.distill.alignment.time import align_global, align_segments
from kvdistill.distill.alignment.tokens import align_tokens

__all__ = [
    "AlignmentQuality",
    "Bags",
    "Band",
    "GroupMap",
    "LayerMap",
    "Spans",
    "align_global",
    "align_segments",
    "align_tokens",
    "apply_band",
    "bags_of",
    "by_group",
    "inverse_frequencies",
    "layer_map",
    "linear_cka",
    "monotone_map",
    "quality",
    "rotate",
    "scale_frequencies",
]
