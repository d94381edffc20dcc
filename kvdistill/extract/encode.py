"""Collects the encoded layers of a shard's batches into its packed arrays.

Layers are encoded where and when they are computed, inside the forward pass, so that the
largest thing in memory is one layer of one batch besides the codes themselves. A batch is
encoded in one go with every sample's last token repeated as its padding; that is exactly what a
codec does to fill a sample's last block, so the codes do not depend on the batch. Nothing is
waited for during the pass: codes travel to pinned memory and are put in place afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.importance import QueriesAndKeys, importance, queries_and_keys
from kvdistill.errors import NonFiniteError
from kvdistill.extract.batches import TeacherBatch
from kvdistill.extract.slots import Slots, only_heads, slot_table, slots_of
from kvdistill.store.channel_statistics import ChannelStatistics, merge_moments
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.format import Counts, group_prefix, shard_arrays
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.shard import EncodedShard, TokenTable, block_ptr
from kvdistill.types import KINDS, SEGMENT_SPECIAL, Kind, LayerGroup


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a layer goes: its group, and its row on the group's layer axis."""

    group_idx: int
    row: int
    prefix: str
    layer: VerifiedLayer


@dataclass(frozen=True, eq=False)
class _Guides:
    """What encoding needs to know of a batch, on one device."""

    text_mask_BT: Tensor
    stored_mask_BT: Tensor
    """Which positions are stored: real tokens, or the slots that are filled."""
    last_idx_B: Tensor
    """The last of these."""
    attended: QueriesAndKeys | None
    slots: Slots | None

    @staticmethod
    def of(shard: ShardPacker, batch: TeacherBatch) -> _Guides:
        segments, width = shard.segments(batch), batch.input_ids.shape[1]
        slots = None
        lengths = torch.tensor(batch.lengths)
        if shard.manifest.eviction is not None:
            names = [shard.tokens.sample_ids[i] for i in batch.sample_idx]
            slots = slots_of(shard.manifest.eviction, segments, names, width)
            lengths, width = slots.count, shard.manifest.eviction.budget
        stored_mask = torch.arange(width) < lengths[:, None]
        attended = queries_and_keys(segments) if shard.manifest.has_importance else None
        last_idx = (lengths - 1).clamp_min(0)
        return _Guides(text_mask(segments, batch), stored_mask, last_idx, attended, slots)

    def to(self, device: torch.device) -> _Guides:
        attended = None if self.attended is None else self.attended.to(device)
        slots = None if self.slots is None else self.slots.to(device)
        text, stored = self.text_mask_BT.to(device), self.stored_mask_BT.to(device)
        return _Guides(text, stored, self.last_idx_B.to(device), attended, slots)


class ShardPacker:
    """The packed arrays of one shard of one teacher, filled batch by batch.

    ``read`` is the table of the tokens that the teacher reads, ``tokens`` of those it stores.
    """

    def __init__(
        self, manifest: TeacherManifest, layers: Sequence[VerifiedLayer], tokens: TokenTable
    ) -> None:
        self.read = tokens
        if manifest.eviction is not None:
            tokens = slot_table(tokens, manifest.eviction)
        self.tokens = tokens
        self.ptr = {"token": tokens.sample_ptr, "block": block_ptr(tokens.sample_ptr)}
        self.manifest = manifest
        counts = Counts(tokens.num_samples, tokens.num_tokens, tokens.num_blocks)
        self.arrays = {
            name: np.zeros(spec.shape, spec.dtype)
            for name, spec in shard_arrays(manifest, counts).items()
            if spec.group is not None or spec.name.startswith("hidden_")
        }
        self.places = _places(manifest, layers)
        self.codecs = {"key": CODECS[manifest.codec.key], "value": CODECS[manifest.codec.value]}
        self.moments = SampleMoments(manifest.groups, tokens.num_samples)

    def begin(self, batch: TeacherBatch) -> BatchPacker:
        """Start a batch; nothing of it is kept before its ``finish``."""
        return BatchPacker(self, batch)

    def shard(self) -> EncodedShard:
        """The finished shard."""
        return EncodedShard(self.tokens, self.arrays)

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Channel statistics over the tokens that stand for text, by array prefix and kind."""
        return {
            f"{group_prefix(self.manifest, group_idx)}{kind}": self.moments.merged(group_idx, kind)
            for group_idx in range(len(self.manifest.groups))
            for kind in KINDS
        }

    def segments(self, batch: TeacherBatch) -> list[NDArray[np.int8]]:
        """Segments of a batch's samples, ``[T]`` each."""
        return [self.read.segment[self.read.span(i)] for i in batch.sample_idx]


class BatchPacker:
    """One batch on its way into a shard: encoded during the forward pass, placed after it."""

    def __init__(self, shard: ShardPacker, batch: TeacherBatch) -> None:
        self._shard, self._batch = shard, batch
        self._guides = _Guides.of(shard, batch)
        self._on: dict[torch.device, _Guides] = {}
        """Copied once per device: a model may be spread over several."""
        self._codes: list[tuple[_Place, str, str, Tensor]] = []
        self._means: list[tuple[_Place, Kind, Tensor, Tensor]] = []

    def add(self, layer_idx: int, qkv: QKV) -> None:
        """Encode one layer on the device it was computed on. Does not wait for the device."""
        place = self._shard.places[layer_idx]
        device = qkv.key.device
        if device not in self._on:
            self._on[device] = self._guides.to(device)
        guides = self._on[device]
        qkv = only_heads(qkv, self._shard.manifest.kept_heads)
        received = None
        if guides.attended is not None:
            received = self._importance(place, qkv, guides.attended)
        kept = None
        if guides.slots is not None:
            kept = guides.slots.choose(qkv.key, received, place.layer.rotary, layer_idx)
            self._keep(place, "kept", kept.index_BLHM[:, 0].int())
        for kind in KINDS:
            x_BHTD = qkv.key if kind == "key" else qkv.value
            mean, m2 = moments(x_BHTD, guides.text_mask_BT)
            self._means.append((place, kind, _off(mean), _off(m2)))
            if kept is not None:
                x_BHTD = kept.keep(x_BHTD.unsqueeze(1)).squeeze(1)
            self._encode(place, kind, hold_last(x_BHTD, guides.last_idx_B, guides.stored_mask_BT))
        if received is not None:
            if kept is not None:
                received = kept.keep(received[:, None, ..., None])[:, 0, ..., 0]
            self._keep(place, "importance", received.to(torch.float16))

    def _encode(self, place: _Place, kind: Kind, x_BHTD: Tensor) -> None:
        codec = self._shard.codecs[kind]
        encoded = codec.encode(x_BHTD, kind)
        for part in codec.parts(kind):
            name = part_name(kind, part.suffix)
            self._keep(place, name, encoded[part.suffix], part.per)

    def _keep(self, place: _Place, name: str, x: Tensor, per: str = "token") -> None:
        self._codes.append((place, f"{place.prefix}{name}", per, _off(x)))

    def finish(self) -> None:
        """Wait for the device, check, and put everything where it belongs.

        Raises:
            NonFiniteError: NaN or infinity; names layer, head and sample.
        """
        _wait(self._on)
        index = list(self._batch.sample_idx)
        count = self._guides.text_mask_BT.sum(dim=1).numpy()
        for place, kind, mean, m2 in self._means:
            self._refuse_non_finite(place, kind, mean)
            self._shard.moments.put(
                place.group_idx,
                place.row,
                kind,
                index,
                (count, mean.double().numpy(), m2.double().numpy()),
            )
        for place, name, per, codes in self._codes:
            target = self._shard.arrays[name][place.row]
            self._scatter(codes.numpy(), target, self._shard.ptr[per])

    def _importance(self, place: _Place, qkv: QKV, attended: QueriesAndKeys) -> Tensor:
        return importance(
            qkv.query,
            qkv.key,
            attended,
            place.layer.scaling,
            place.layer.rotary,
            causal=self._shard.manifest.kind != "encoder"
            and self._shard.manifest.stream != "encoder",
            softcap=place.layer.softcap,
        )

    def _scatter(
        self, part: NDArray[np.generic], target: NDArray[np.generic], ptr: NDArray[np.int64]
    ) -> None:
        for row, sample_idx in enumerate(self._batch.sample_idx):
            start, end = int(ptr[sample_idx]), int(ptr[sample_idx + 1])
            target[:, start:end] = part[row, :, : end - start]

    def _refuse_non_finite(self, place: _Place, kind: Kind, mean_BHD: Tensor) -> None:
        finite = mean_BHD.isfinite().all(dim=2)
        if bool(finite.all()):
            return
        row, head = (int(i) for i in (~finite).nonzero()[0])
        sample_id = self._shard.tokens.sample_ids[self._batch.sample_idx[row]]
        raise NonFiniteError(
            f"teacher {self._shard.manifest.name!r}, layer {place.layer.layer_idx}, head {head}, "
            f"sample {sample_id!r}: its {kind}s are not finite in {self._shard.manifest.dtype}; "
            "try dtype float32 or bfloat16"
        )


def text_mask(segments: Sequence[NDArray[np.int8]], batch: TeacherBatch) -> Tensor:
    """``[B, T]`` bool, on the CPU: tokens that stand for text.

    Statistics count these alone: the first token is often an attention sink whose keys are so
    large that they would drown the rest.
    """
    mask = np.zeros(tuple(batch.input_ids.shape), bool)
    for row, segment in enumerate(segments):
        mask[row, : len(segment)] = segment != SEGMENT_SPECIAL
    return torch.from_numpy(mask)


def hold_last(x_BHTD: Tensor, last_idx_B: Tensor, stored_mask_BT: Tensor) -> Tensor:
    """Replace padding by each sample's last stored token; contiguous.

    A tap's heads lie interleaved; codecs are five times faster on what lies in order.
    """
    idx = last_idx_B[:, None, None, None].expand(-1, x_BHTD.shape[1], 1, x_BHTD.shape[3])
    held = x_BHTD.where(stored_mask_BT[:, None, :, None], x_BHTD.gather(2, idx))
    return held.contiguous()


def _places(manifest: TeacherManifest, layers: Sequence[VerifiedLayer]) -> dict[int, _Place]:
    measured = {layer.layer_idx: layer for layer in layers}
    return {
        layer_idx: _Place(group_idx, row, group_prefix(manifest, group_idx), measured[layer_idx])
        for group_idx, group in enumerate(manifest.groups)
        for row, layer_idx in enumerate(group.layers)
    }


def _off(x: Tensor) -> Tensor:
    """Start a copy to pinned memory; on the CPU, the tensor itself."""
    if x.device.type != "cuda":
        return x.cpu()
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def _wait(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


Moments = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Per sample: count ``[B]``, mean and M2 ``[B, H, D]``."""


def moments(x_BHTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 over the tokens under the mask: ``[B, H, D]`` each, on the device.

    Two passes in float32 within a sample, as products with the mask, which is what a processor
    does best; samples are then merged in float64. A NaN or infinity anywhere in a sample, masked
    or not, makes its mean NaN.
    """
    num_samples, num_heads, num_tokens, head_dim = x_BHTD.shape
    flat = x_BHTD.transpose(1, 2).reshape(num_samples, num_tokens, num_heads * head_dim).float()
    weight_B1T = mask_BT[:, None].float()
    mean = weight_B1T @ flat / weight_B1T.sum(dim=2, keepdim=True).clamp_min(1)
    m2 = weight_B1T @ (flat - mean).square_()
    shape = (num_samples, num_heads, head_dim)
    return mean.reshape(shape), m2.reshape(shape)


class SampleMoments:
    """Per group, kind and sample: count, mean and M2 of every (layer, head, channel)."""

    def __init__(self, groups: Sequence[LayerGroup], num_samples: int) -> None:
        self._count = np.zeros(num_samples, np.int64)
        shapes = {
            (group_idx, kind): (
                num_samples,
                len(group.layers),
                group.num_key_value_heads,
                group.head_dim(kind),
            )
            for group_idx, group in enumerate(groups)
            for kind in KINDS
        }
        self._mean = {key: np.zeros(shape) for key, shape in shapes.items()}
        self._m2 = {key: np.zeros(shape) for key, shape in shapes.items()}

    def put(
        self, group_idx: int, row: int, kind: Kind, sample_idx: list[int], found: Moments
    ) -> None:
        """Keep the moments of a batch's samples, of one layer (``row`` of its group)."""
        count, mean, m2 = found
        self._count[sample_idx] = count
        self._mean[group_idx, kind][sample_idx, row] = mean
        self._m2[group_idx, kind][sample_idx, row] = m2

    def merged(self, group_idx: int, kind: Kind) -> ChannelStatistics:
        """Statistics of all samples together."""
        samples = zip(
            self._count.tolist(),
            self._mean[group_idx, kind],
            self._m2[group_idx, kind],
            strict=True,
        )
        return ChannelStatistics(*merge_moments(*samples))


# MERGED-DOC extract.moments
# Channel statistics of a shard, gathered sample by sample as batches come out of order.
#
# Each sample's count, mean and sum of squared deviations are kept apart and merged at the end in
# the order of the samples, so the result does not depend on how samples were batched.
