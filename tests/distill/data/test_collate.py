"""A batch's codes are each sample's own, and padding decodes to zeros."""

from __future__ import annotations

import numpy as np
import torch

from kvdistill.distill.data.collate import padded_parts
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.shard import EncodedShard, TokenTable
from kvdistill.types import KINDS, CodecSpec

LENGTHS = (130, 1, 64, 65)
LEAD, DIM = (2, 3), 64


def shard(values: dict[str, list[torch.Tensor]], codec: str) -> EncodedShard:
    ptr = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    column = np.zeros(int(ptr[-1]), np.int32)
    names = tuple(str(i) for i in range(len(LENGTHS)))
    tokens = TokenTable(names, ptr, column, column, column, column.astype(np.int8))
    arrays = {}
    for kind in KINDS:
        encoded = [CODECS[codec].encode(x, kind) for x in values[kind]]
        for suffix in encoded[0]:
            pieces = [parts[suffix].numpy() for parts in encoded]
            arrays[part_name(kind, suffix)] = np.concatenate(pieces, axis=2)
    return EncodedShard(tokens, arrays)


def test_padded_codes_decode_to_each_samples_own_and_padding_to_zeros() -> None:
    torch.manual_seed(0)
    values = {kind: [torch.randn(*LEAD, n, DIM) for n in LENGTHS] for kind in KINDS}
    for codec in ("int8", "fp16"):
        one = shard(values, codec)
        spec = CodecSpec.model_validate({"key": codec, "value": codec})
        rows = [(one, i) for i in (2, 0, 3, 1, 0)]
        for kind in KINDS:
            parts = padded_parts(rows, "", kind, spec)
            decoded = CODECS[codec].decode(parts, kind)
            assert decoded.shape == (5, *LEAD, max(LENGTHS), DIM)
            for row, (_, idx) in zip(decoded, rows, strict=True):
                own = CODECS[codec].decode(CODECS[codec].encode(values[kind][idx], kind), kind)
                torch.testing.assert_close(row[:, :, : LENGTHS[idx]], own, rtol=0, atol=0)
                assert not row[:, :, LENGTHS[idx] :].any()
