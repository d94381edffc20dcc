"""Codecs: the stored form of keys and values.

A codec is frozen data, one per name: the arrays it stores (``parts``), ``encode`` and ``decode``.
Keys have a scale per channel and block of 64 tokens, values a scale per token, since the outliers
of keys lie in channels and those of values in tokens (KIVI: A Tuning-Free Asymmetric 2bit
Quantization for KV Cache, arXiv 2402.02750). Scales are fp16 and rounded up, so no value is
clipped and the error of an integer codec is at most half a scale; int4's values are the exception,
which trade the largest error for a smaller mean error.

Encoding runs in torch, on the teacher's device. Decoding is written once for numpy and torch, with
operations that are exact or a single IEEE rounding, so both return the same bits. torch is
imported lazily: reading a store with numpy does not need it.

    bf16, fp16   16 bits   lossless after the cast
    int8          8 bits   symmetric; the default
    fp8_e4m3      8 bits   symmetric with float codes: better for outliers, worse on average
    int4          4 bits   asymmetric; values after a Hadamard rotation
    int4_v1       4 bits   int4 of format 1: fp16 scales and zeros of values
"""

from __future__ import annotations

from typing import Final

from kvdistill.store.codecs.int4 import Asymmetric
from kvdistill.store.codecs.scaled import Cast, Symmetric
from kvdistill.types import CodecName

Codec = Cast | Symmetric | Asymmetric

CODECS: Final[dict[CodecName, Codec]] = {
    "bf16": Cast("bf16"),
    "fp16": Cast("fp16"),
    "int8": Symmetric("int8", largest=127.0),
    "fp8_e4m3": Symmetric("fp8_e4m3", largest=448.0),
    "int4": Asymmetric("int4"),
    "int4_v1": Asymmetric("int4_v1", half_values=True),
}
