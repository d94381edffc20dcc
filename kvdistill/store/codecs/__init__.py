"""How keys and values become bytes, and back.

Keys get a scale per channel and block of 64 tokens, values a scale per token: key outliers sit
in channels, value outliers in tokens (KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV
Cache, arXiv 2402.02750). Scales are fp16, rounded so that no value is ever clipped: the error
of an integer codec is at most half a scale (but for values in int4, which trade it for a smaller
mean error). A codec is frozen data; there is one per name.

Encoding runs in torch, where the teacher runs. Decoding is written once, with operators that
numpy and torch share, so that both give the same bits: every step is one IEEE operation.
torch is imported lazily: looking into a store does not need it.

    bf16, fp16   16 bits   lossless after the cast
    int8          8 bits   symmetric; the default
    fp8_e4m3      8 bits   as int8, with float codes: better for outliers, worse on average
    int4          4 bits   asymmetric; values after a Hadamard rotation
    int4_v1       4 bits   as int4, with fp16 scales and zeros for values; for stores of format 1
"""

from __future__ import annotations

from typing import Final

from kvdistill.store.codecs.int4 import Asymmetric
from kvdistill.store.codecs.parts import Part, part_name, parts_of
from kvdistill.store.codecs.scaled import Cast, Symmetric
from kvdistill.types import CodecName

__all__ = ["CODECS", "Codec", "Part", "part_name", "parts_of"]


Codec = Cast | Symmetric | Asymmetric


CODECS: Final[dict[CodecName, Codec]] = {
    "bf16": Cast("bf16"),
    "fp16": Cast("fp16"),
    "int8": Symmetric("int8", largest=127.0),
    "fp8_e4m3": Symmetric("fp8_e4m3", largest=448.0),
    "int4": Asymmetric("int4"),
    "int4_v1": Asymmetric("int4_v1", wide=True),
}
