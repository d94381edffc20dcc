"""Encodes captured layers, batch by batch, into the packed arrays of a shard.

Layers are encoded where and when they are computed, inside the forward pass, so that memory holds
one layer of one batch besides the codes. A batch is encoded as a whole, with each sample's last
token repeated as its padding; a codec fills a sample's last block in the same way, so the codes do
not depend on the batch. The pass never waits for the device: codes are copied to pinned memory and
placed while the device computes the next pass.

Channel statistics are reduced per sample and merged in the order of the samples, so they do not
depend on the batches either.

Codec ``klt`` is fitted on a pilot, texts from all over the corpus. Its weights are what attention
makes of an error. A key counts through its product with queries: its channels weigh the queries'
mean squares, averaged over the two channels of a rotated pair, which rotation mixes. A value enters
the output as it is, relative to the other values of its head: its channels weigh the inverse of the
head's mean variance. So do keys where there are no queries (a teacher read through its cache).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.importance import QueriesAndKeys, importance, queries_and_keys
from kvdistill.attention.verification import CACHE
from kvdistill.corpus.samples import Sample
from kvdistill.errors import NonFiniteError, TeacherError
from kvdistill.extract.slots import Slots, keep_heads, slot_table
from kvdistill.extract.teacher import Teacher
from kvdistill.extract.tokenise import TeacherBatch, TokenisedSample, collate_teacher_batch
from kvdistill.store.channel_statistics import ChannelStatistics, merge_moments
from kvdistill.store.codecs import Transforms, codec_of
from kvdistill.store.codecs.klt import Basis, Transform, fit_basis, flatten_layers, layer_blocks
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.derived import blocks_of
from kvdistill.store.format import TOKEN_COLUMNS, UNPREDICTED, Counts, group_prefix, shard_arrays
from kvdistill.store.manifest import RotarySpec, TeacherManifest
from kvdistill.store.shard import TokenTable, block_ptr
from kvdistill.types import KINDS, PLURALS, SEGMENT_SPECIAL, Kind

_LEAST_TOKENS: Final = 8
"""Fewer give no second moments."""
_SMALLEST_WEIGHT: Final = 1e-4
"""Of a channel, relative to the mean of its head."""


class ShardPacker:
    """The packed arrays of one shard of one teacher, filled batch by batch."""

    def __init__(
        self,
        manifest: TeacherManifest,
        layers: Sequence[VerifiedLayer],
        tokens: TokenTable,
        transforms: Transforms | None = None,
    ) -> None:
        self.tokens_read = tokens
        """Tokens that the teacher reads; ``tokens`` are those that are stored."""
        if manifest.eviction is not None:
            tokens = slot_table(tokens, manifest.eviction)
        self.tokens = tokens
        self.ptr = {
            "token": tokens.sample_ptr,
            "block": block_ptr(tokens.sample_ptr),
            "sample": np.arange(tokens.num_samples + 1),
        }
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
        self.codecs = {
            (group_idx, kind): codec_of(
                manifest.codec, kind, transforms or {}, group_prefix(manifest, group_idx)
            )
            for group_idx in range(len(manifest.groups))
            for kind in manifest.kinds
        }
        self.text_counts = np.zeros(tokens.num_samples, np.int64)
        self.moments = {
            (group_idx, kind): np.zeros(
                (2, tokens.num_samples, len(group.layers), *manifest.shape(group, kind))
            )
            for group_idx, group in enumerate(manifest.groups)
            for kind in manifest.kinds
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
        self._held: dict[tuple[int, Kind, int], dict[int, Tensor]] = {}
        """Layers of blocks that are not complete, by group, kind and block (codec klt)."""
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
        for kind in self._shard.manifest.kinds:
            x_BHTD = getattr(qkv, kind)
            mean, m2 = moments(x_BHTD, masks.text_mask_BT)
            self._moments.append((row, kind, start_copy(mean), start_copy(m2)))
            if kept is not None:
                x_BHTD = kept.keep(x_BHTD.unsqueeze(1)).squeeze(1)
            codec = self._shard.codecs[row.group_idx, kind]
            x_BHTD = repeat_last(x_BHTD, masks.last_idx_B, masks.stored_mask_BT)
            if isinstance(codec, Transform):
                self._add_to_block(row, kind, codec, x_BHTD)
                continue
            encoded = codec.encode(x_BHTD, kind)
            for part in codec.parts(kind):
                self._collect(row, part_name(kind, part.suffix), encoded[part.suffix], part.per)
        if received is not None:
            if kept is not None:
                received = kept.keep(received[:, None, ..., None])[:, 0, ..., 0]
            self._collect(row, "importance", received.to(torch.float16))

    def _add_to_block(self, row: _LayerRow, kind: Kind, codec: Transform, x_BHTD: Tensor) -> None:
        """Keep a layer until all of its block are there, which are then encoded together."""
        layer_idx = row.layer.layer_idx
        at = next(i for i, (layers, _) in enumerate(codec.blocks) if layer_idx in layers)
        layers, basis = codec.blocks[at]
        held = self._held.setdefault((row.group_idx, kind, at), {})
        held[layer_idx] = x_BHTD
        self._collect(row, part_name(kind, "exact"), x_BHTD[:, :, :1].half(), "sample")
        if len(held) == len(layers):
            rows = [held[layer].to(x_BHTD.device) for layer in layers]
            packed = basis.encode(flatten_layers(torch.stack(rows, dim=1)), codec.num_bytes)
            self._collect(row._replace(row=at), kind, packed[:, None])
            del self._held[row.group_idx, kind, at]

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
            f"sample {sample_id!r}: {PLURALS[kind]} are not finite in "
            f"{self._shard.manifest.dtype}; try dtype float32 or bfloat16"
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


class TeacherPilot:
    """Keys and values of the pilot's tokens on the CPU, and second moments of its queries."""

    def __init__(self, heads: Sequence[int] | None) -> None:
        self.heads, self.real_mask = heads, torch.empty(0)
        self.rows: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        """``[N, H, D]`` of every batch, by kind and layer."""
        self.squares: dict[int, Tensor] = {}
        """Sums of squared queries, ``[H, D]`` by layer."""

    def add(self, layer_idx: int, qkv: QKV) -> None:
        """One layer of a batch; first tokens and padding are left out."""
        qkv = keep_heads(qkv, self.heads)
        mask = self.real_mask.to(qkv.key.device).clone()
        mask[:, 0] = False
        for kind, x_BHTD in zip(KINDS, (qkv.key, qkv.value), strict=True):
            self.rows[kind, layer_idx].append(x_BHTD.transpose(1, 2)[mask].float().cpu())
        groups = qkv.query.unflatten(1, (qkv.key.shape[1], -1)).float()  # type: ignore[no-untyped-call]
        square_HD = (groups.square().mean(dim=2) * mask[:, None, :, None]).sum(dim=(0, 2)).cpu()
        self.squares[layer_idx] = self.squares.get(layer_idx, 0) + square_HD


def read_pilot(teacher: Teacher, samples: Iterable[Sample], batch_tokens: int) -> TeacherPilot:
    """Run the teacher over evenly spaced samples until there are ``codec.pilot_tokens`` tokens.

    Its own rationales are not generated for this.
    """
    pilot, budget = TeacherPilot(teacher.manifest.kept_heads), teacher.manifest.codec.pilot_tokens
    read = [sample for sample in samples if sample.is_of(teacher.manifest.parts)]
    step = max(1, len(read) // max(1, budget // 16))
    limit = min(teacher.max_length or budget, budget)
    tokenised: list[TokenisedSample] = []
    count = 0
    for sample in read[::step]:
        if count < budget:
            tokenised += teacher.tokenise([sample], limit)
            count += tokenised[-1].num_tokens
    for sample_idx in teacher.batches([sample.num_tokens for sample in tokenised], batch_tokens):
        batch = collate_teacher_batch(tokenised, sample_idx, teacher.pad_id, teacher.device)
        pilot.real_mask = batch.real_mask
        teacher.run(batch, pilot.add)
    return pilot


def fit_bases(teacher: Teacher, samples: Iterable[Sample], batch_tokens: int) -> dict[str, Basis]:
    """Bases of all blocks by stem and block, ``key.0``, of a teacher that is stored in ``klt``."""
    return bases_of(teacher, read_pilot(teacher, samples, batch_tokens))


def bases_of(teacher: Teacher, pilot: TeacherPilot) -> dict[str, Basis]:
    """As ``fit_bases``, from a pilot that has been read.

    Raises:
        TeacherError: the pilot has next to no tokens.
    """
    manifest, device, bases = teacher.manifest, teacher.device, {}
    for stem, layout in blocks_of(manifest).items():
        kind = KINDS[stem.endswith("value")]
        for i, layers in enumerate(layer_blocks(layout.layers, manifest.codec.block_layers)):
            rows = [torch.cat(pilot.rows[kind, j]) for j in layers if pilot.rows[kind, j]]
            num_tokens = len(rows[0]) if rows else 0
            if num_tokens < _LEAST_TOKENS:
                raise TeacherError(
                    f"teacher {manifest.name!r}: codec klt is fitted on the corpus, but the texts "
                    f"read for it have {num_tokens} tokens besides their first; use codec int8"
                )
            x_TLHD = torch.stack(rows, dim=1)
            weight_LHD = _channel_weights(teacher, pilot, kind, layers, x_TLHD)
            x_TN, weight_N = x_TLHD.flatten(1).to(device), weight_LHD.flatten().to(device)
            bases[f"{stem}.{i}"] = fit_basis(x_TN, weight_N, layout.num_bytes)
    return bases


def _channel_weights(
    teacher: Teacher, pilot: TeacherPilot, kind: Kind, layers: Sequence[int], x_TLHD: Tensor
) -> Tensor:
    """What a squared error of every channel counts, ``[L, H, D]``."""
    if kind == "value" or teacher.manifest.adapter == CACHE.name:
        variance_LH1 = x_TLHD.var(dim=0).mean(dim=2, keepdim=True)
        return (1 / variance_LH1.clamp_min(1e-12)).expand(x_TLHD.shape[1:])
    rotary = {layer.layer_idx: layer.rotary for layer in teacher.layers}
    square_LHD = torch.stack([_of_pairs(pilot.squares[j], rotary[j]) for j in layers])
    least = square_LHD.mean(dim=2, keepdim=True) * _SMALLEST_WEIGHT
    return torch.maximum(square_LHD, least.clamp_min(1e-12))


def _of_pairs(square_HD: Tensor, spec: RotarySpec | None) -> Tensor:
    """Mean squares of queries, equal in the two channels that a rotation mixes."""
    if spec is None:
        return square_HD
    start, found = spec.rotary_start, square_HD.clone()
    rotated = square_HD[:, start : start + spec.rotary_dim]
    shape, axis = ((-1, 2), -1) if spec.interleaved else ((2, -1), -2)
    pairs = rotated.unflatten(-1, shape)  # type: ignore[no-untyped-call]
    mean = pairs.mean(dim=axis, keepdim=True).expand_as(pairs)
    found[:, start : start + spec.rotary_dim] = mean.flatten(-2)
    return found
