"""Encodes captured layers, batch by batch, into the packed arrays of a shard.

Layers are encoded where and when they are computed, inside the forward pass, so that memory holds
one layer of one batch besides the codes. A batch is encoded as a whole, with each sample's last
token repeated as its padding; a codec fills a sample's last block in the same way, so the codes do
not depend on the batch. The pass never waits for the device: codes are copied to pinned memory and
placed while the device computes the next pass.

Channel statistics are reduced per sample and merged in the order of the samples, so they do not
depend on the batches either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.importance import QueriesAndKeys, importance, queries_and_keys
from kvdistill.errors import NonFiniteError
from kvdistill.extract.slots import Slots, keep_heads, slot_table
from kvdistill.extract.tokenise import TeacherBatch
from kvdistill.store.channel_statistics import ChannelStatistics, merge_moments
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.format import TOKEN_COLUMNS, UNPREDICTED, Counts, group_prefix, shard_arrays
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.shard import TokenTable, block_ptr
from kvdistill.types import KINDS, SEGMENT_SPECIAL, Kind


class ShardPacker:
    """The packed arrays of one shard of one teacher, filled batch by batch."""

    def __init__(
        self, manifest: TeacherManifest, layers: Sequence[VerifiedLayer], tokens: TokenTable
    ) -> None:
        self.tokens_read = tokens
        """Tokens that the teacher reads; ``tokens`` are those that are stored."""
        if manifest.eviction is not None:
            tokens = slot_table(tokens, manifest.eviction)
        self.tokens = tokens
        self.ptr = {"token": tokens.sample_ptr, "block": block_ptr(tokens.sample_ptr)}
        self.manifest = manifest
        counts = Counts(tokens.num_samples, tokens.num_tokens, tokens.num_blocks)
        self.arrays = {
            name: np.full(spec.shape, float(spec.attributes.get(UNPREDICTED, 0)), spec.dtype)
            for name, spec in shard_arrays(manifest, counts).items()
            if name not in ("sample_ptr", *TOKEN_COLUMNS) and not name.endswith("_statistics")
        }
        by_index = {layer.layer_idx: layer for layer in layers}
        self.rows = {
            layer_idx: _LayerRow(
                group_idx, row, group_prefix(manifest, group_idx), by_index[layer_idx]
            )
            for group_idx, group in enumerate(manifest.groups)
            for row, layer_idx in enumerate(group.layers)
        }
        self.codecs = {"key": CODECS[manifest.codec.key], "value": CODECS[manifest.codec.value]}
        self.text_counts = np.zeros(tokens.num_samples, np.int64)
        self.moments = {
            (group_idx, kind): np.zeros(
                (2, tokens.num_samples, len(group.layers), group.num_key_value_heads, dim)
            )
            for group_idx, group in enumerate(manifest.groups)
            for kind in KINDS
            for dim in (group.head_dim(kind),)
        }
        """Mean and M2 per sample: ``[2, N, L, H, D]`` of every group and kind."""

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Channel statistics over the tokens of text, by array prefix and kind."""
        merged = {}
        for (group_idx, kind), (mean, m2) in self.moments.items():
            samples = zip(self.text_counts.tolist(), mean, m2, strict=True)
            prefix = group_prefix(self.manifest, group_idx)
            merged[f"{prefix}{kind}"] = ChannelStatistics(*merge_moments(*samples))
        return merged

    def place(self, batch: TeacherBatch, found: Mapping[str, Tensor]) -> None:
        """Predictions of all tokens of a batch but the first of each sample, ``[N, …]`` by name."""
        first = self.tokens.sample_ptr[list(batch.sample_idx)]
        spans = [np.arange(i + 1, i + n) for i, n in zip(first, batch.lengths, strict=True)]
        for name, x in found.items():
            self.arrays[name][np.concatenate(spans)] = x.numpy()

    def segments(self, batch: TeacherBatch) -> list[NDArray[np.int8]]:
        """Segments of a batch's samples, ``[T]`` each."""
        return [self.tokens_read.segment[self.tokens_read.span(i)] for i in batch.sample_idx]


class _LayerRow(NamedTuple):
    """Where a layer is stored: its group, and its row on the group's layer axis."""

    group_idx: int
    row: int
    prefix: str
    layer: VerifiedLayer


class _BatchMasks(NamedTuple):
    """Which tokens of a batch are counted, stored, queries and keys; on one device."""

    text_mask_BT: Tensor
    stored_mask_BT: Tensor
    """Positions that are stored: real tokens, or the slots that are filled."""
    last_idx_B: Tensor
    """The last of these."""
    queries_and_keys: QueriesAndKeys | None
    slots: Slots | None

    @staticmethod
    def of(shard: ShardPacker, batch: TeacherBatch) -> _BatchMasks:
        segments, width = shard.segments(batch), batch.input_ids.shape[1]
        slots = None
        lengths = torch.tensor(batch.lengths)
        if shard.manifest.eviction is not None:
            sample_ids = [shard.tokens.sample_ids[i] for i in batch.sample_idx]
            slots = Slots.of(shard.manifest.eviction, segments, sample_ids, width)
            lengths, width = slots.lengths, shard.manifest.eviction.budget
        stored_mask = torch.arange(width) < lengths[:, None]
        chosen = queries_and_keys(segments) if shard.manifest.has_importance else None
        last_idx = (lengths - 1).clamp_min(0)
        return _BatchMasks(text_mask(segments, batch), stored_mask, last_idx, chosen, slots)


class BatchPacker:
    """One batch on its way into a shard: encoded during the forward pass, placed after it."""

    def __init__(self, shard: ShardPacker, batch: TeacherBatch) -> None:
        self._shard, self._batch = shard, batch
        self._masks = _BatchMasks.of(shard, batch)
        self._masks_on: dict[torch.device, _BatchMasks] = {}
        """Copied once per device: a model may be spread over several."""
        self._codes: list[tuple[_LayerRow, str, str, Tensor]] = []
        self._moments: list[tuple[_LayerRow, Kind, Tensor, Tensor]] = []

    def add(self, layer_idx: int, qkv: QKV) -> None:
        """Encode one layer on the device it was computed on, without waiting for the device."""
        row, device = self._shard.rows[layer_idx], qkv.key.device
        if device not in self._masks_on:
            self._masks_on[device] = send_to_device(self._masks, device)
        masks, heads = self._masks_on[device], self._shard.manifest.kept_heads
        received = kept = None
        if masks.queries_and_keys is not None:
            received = importance(qkv.query, qkv.key, masks.queries_and_keys, row.layer)
            if heads is not None:
                received = received[:, list(heads)]
        qkv = keep_heads(qkv, heads)
        if masks.slots is not None:
            kept = masks.slots.choose(qkv.key, received, row.layer.rotary, layer_idx)
            self._collect(row, "kept", kept.index_BLHM[:, 0].int())
        for kind in KINDS:
            x_BHTD = qkv.key if kind == "key" else qkv.value
            mean, m2 = moments(x_BHTD, masks.text_mask_BT)
            self._moments.append((row, kind, start_copy(mean), start_copy(m2)))
            if kept is not None:
                x_BHTD = kept.keep(x_BHTD.unsqueeze(1)).squeeze(1)
            codec = self._shard.codecs[kind]
            x_BHTD = repeat_last(x_BHTD, masks.last_idx_B, masks.stored_mask_BT)
            encoded = codec.encode(x_BHTD, kind)
            for part in codec.parts(kind):
                self._collect(row, part_name(kind, part.suffix), encoded[part.suffix], part.per)
        if received is not None:
            if kept is not None:
                received = kept.keep(received[:, None, ..., None])[:, 0, ..., 0]
            self._collect(row, "importance", received.to(torch.float16))

    def _collect(self, row: _LayerRow, name: str, x: Tensor, per: str = "token") -> None:
        self._codes.append((row, f"{row.prefix}{name}", per, start_copy(x)))

    def end_pass(self) -> None:
        """Mark the end of the pass: what ``finish`` waits for, and for nothing launched later."""
        devices = [device for device in self._masks_on if device.type == "cuda"]
        self._ends = [torch.cuda.current_stream(device).record_event() for device in devices]

    def finish(self) -> None:
        """Wait for the pass, check, and place everything in the shard's arrays.

        Raises:
            NonFiniteError: NaN or infinity; names layer, head and sample.
        """
        for end in self._ends:
            end.synchronize()
        sample_idx = list(self._batch.sample_idx)
        self._shard.text_counts[sample_idx] = self._masks.text_mask_BT.sum(dim=1).numpy()
        for row, kind, mean, m2 in self._moments:
            self._refuse_non_finite(row.layer, kind, mean)
            target = self._shard.moments[row.group_idx, kind]
            target[0, sample_idx, row.row], target[1, sample_idx, row.row] = mean, m2
        for row, name, per, codes in self._codes:
            packed, ptr = self._shard.arrays[name][row.row], self._shard.ptr[per]
            for encoded, i in zip(codes.numpy(), self._batch.sample_idx, strict=True):
                packed[:, ptr[i] : ptr[i + 1]] = encoded[:, : ptr[i + 1] - ptr[i]]

    def _refuse_non_finite(self, layer: VerifiedLayer, kind: Kind, mean_BHD: Tensor) -> None:
        finite = mean_BHD.isfinite().all(dim=2)
        if bool(finite.all()):
            return
        row, head = (int(i) for i in (~finite).nonzero()[0])
        sample_id = self._shard.tokens.sample_ids[self._batch.sample_idx[row]]
        raise NonFiniteError(
            f"teacher {self._shard.manifest.name!r}, layer {layer.layer_idx}, head {head}, "
            f"sample {sample_id!r}: {kind}s are not finite in {self._shard.manifest.dtype}; "
            "try dtype float32 or bfloat16"
        )


def text_mask(segments: Sequence[NDArray[np.int8]], batch: TeacherBatch) -> Tensor:
    """``[B, T]`` bool, on the CPU: tokens of text.

    Statistics count these alone: the first token is often an attention sink whose keys are so
    large that they would dominate.
    """
    mask = np.zeros(tuple(batch.input_ids.shape), bool)
    for row, segment in enumerate(segments):
        mask[row, : len(segment)] = segment != SEGMENT_SPECIAL
    return torch.from_numpy(mask)


def repeat_last(x_BHTD: Tensor, last_idx_B: Tensor, stored_mask_BT: Tensor) -> Tensor:
    """Replace padding by each sample's last stored token; contiguous.

    The heads of a tap are interleaved in memory; codecs are five times faster on contiguous input.
    """
    idx = last_idx_B[:, None, None, None].expand(-1, x_BHTD.shape[1], 1, x_BHTD.shape[3])
    repeated = x_BHTD.where(stored_mask_BT[:, None, :, None], x_BHTD.gather(2, idx))
    return repeated.contiguous()


def start_copy(x: Tensor) -> Tensor:
    """Start a copy to pinned memory; on the CPU, the tensor itself."""
    if x.device.type != "cuda":
        return x.cpu()
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def moments(x_BHTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 over the tokens under the mask: ``[B, H, D]`` each, on the device.

    Two passes in float32 within a sample, as matrix products with the mask; samples are then
    merged in float64. A NaN or infinity anywhere in a sample, masked or not, makes its mean NaN.
    """
    num_samples, num_heads, num_tokens, head_dim = x_BHTD.shape
    flat = x_BHTD.transpose(1, 2).reshape(num_samples, num_tokens, num_heads * head_dim).float()
    weight_B1T = mask_BT[:, None].float()
    mean = weight_B1T @ flat / weight_B1T.sum(dim=2, keepdim=True).clamp_min(1)
    m2 = weight_B1T @ (flat - mean).square_()
    shape = (num_samples, num_heads, head_dim)
    return mean.reshape(shape), m2.reshape(shape)
