"""Codecs that only cast: lossless for a teacher of that dtype, 16 bits an element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdistill.store.codecs.arrays import bits_to_float32, to_float32
from kvdistill.store.codecs.parts import Part, codes
from kvdistill.types import CodecName, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.arrays import Array


@dataclass(frozen=True)
class Cast:
    """bf16 (stored as its bits: numpy and zarr have no such type) or fp16."""

    name: CodecName

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        if self.name == "bf16":
            return (codes("uint16", "bfloat16"),)
        return (codes("float16", "float16"),)

    def encode(self, x: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
        """``[..., T, D]`` of one sample → its cast; infinite beyond fp16's range."""
        import torch

        if self.name == "bf16":
            return {"": x.to(torch.bfloat16).view(torch.uint16)}
        return {"": x.to(torch.float16)}

    def decode(
        self, parts: Mapping[str, Array], kind: Kind, block_idx: Array | None = None
    ) -> Array:
        """``[..., T, D]`` codes, numpy or torch → float32 ``[..., T, D]``, the same bits."""
        if self.name == "bf16":
            return bits_to_float32(parts[""], "bfloat16")
        return to_float32(parts[""])
